"""What would a static bag of tokens learn from the same pairs in the same time? sentence-transformers trains it, with
its own losses.

    python benchmarks/static_bag.py RUN [--seconds S] [--out runs/benchmarks]

Tokens and sources are those of RUN's weak stage, as often as they have pairs; the dims are RUN's; S, unless given, is
what RUN's training took from reading to the end, which the bag spends on steps alone. A token's vector starts as random
numbers times its idf. Needs `pip install accelerate`. Evaluates the bag as `conan_engine.evaluate` does; prints the
scores and writes static-bag.json, which that shows with --beside.
"""

import json
import tempfile
import time

import measured
import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import TrainerCallback

from conan_engine.data import build
from conan_engine.data.tokenizer import Tokenizer
from conan_engine.evaluation import tasks
from conan_engine.export import fast_tokenizer
from conan_engine.run import checkpoint
from conan_engine.settings import from_dict

BATCH, LR, TEMPERATURE = 2048, 5e-2, 0.05


class Stop(TrainerCallback):
    """After a time."""

    def __init__(self, seconds):
        self.seconds, self.began = seconds, None

    def on_train_begin(self, *_, **__):
        self.began = time.perf_counter()

    def left(self):
        return 1 - (time.perf_counter() - self.began) / self.seconds if self.began else 1

    def on_step_end(self, _, __, control, **___):
        control.should_training_stop = self.left() <= 0


def pairs(source, about):
    """A source of the weak stage as sentence-transformers takes pairs."""
    kind, records = build.read(source, "weak", about)
    if kind == "pairs":
        return Dataset.from_list([{"anchor": r["query"], "positive": r["pos"][0]} for r in records])
    return Dataset.from_list([{"anchor": r["input"], "positive": r["output"]} for r in records])


def idf(tokenizer, sources):
    """Of each token, from 0 to 1 for the rarest."""
    have = np.zeros(tokenizer.vocab_size)
    texts = [text for source in sources.values() for field in ("anchor", "positive") for text in source[field]]
    for ids in tokenizer.encode_batch(texts):
        have[np.unique(np.asarray(ids, np.int64))] += 1
    found = np.log((1 + len(texts)) / (1 + have))
    return found / found.max()


def main():
    parser = measured.Parser(__doc__)
    parser.add_argument("run", help="a run folder, such as runs/demo")
    parser.add_argument("--seconds", type=float)
    arguments = parser.parse_args()
    _, state = checkpoint.newest(arguments.run)
    settings, tokenizer = from_dict(state["config"], arguments.run), Tokenizer.load(Tokenizer.of(arguments.run))
    dims, width = settings.supervised.dims, settings.model.width
    stop = Stop(arguments.seconds or state["seconds"])

    sources = {source: pairs(source, about) for source, about in settings.weak.data.items()}
    start = (
        torch.randn(tokenizer.vocab_size, width, generator=torch.Generator().manual_seed(0))
        * torch.from_numpy(idf(tokenizer, sources)).float()[:, None]
    )
    bag = StaticEmbedding(fast_tokenizer.convert(tokenizer), embedding_weights=start)
    model = SentenceTransformer(modules=[bag], device="cpu")
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, stop.left()))
    loss = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE), sorted(dims, reverse=True))
    with tempfile.TemporaryDirectory() as folder:
        options = SentenceTransformerTrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            max_steps=1_000_000,
            save_strategy="no",
            report_to="none",
            logging_steps=50,
            use_cpu=True,
            max_grad_norm=0,
        )
        trainer = SentenceTransformerTrainer(
            model, options, sources, loss=loss, callbacks=[stop], optimizers=(optimizer, schedule)
        )
        trainer.train()

    given = tasks.load()
    encode = lambda texts: model.encode(texts, batch_size=512, normalize_embeddings=True, show_progress_bar=False)
    results = {"name": "static bag", "params": sum(p.numel() for p in model.parameters())}
    results |= {
        "machine": measured.processor(),
        "steps": trainer.state.global_step,
        "pairs": trainer.state.global_step * BATCH,
    }
    results |= {"seconds.train": stop.seconds, **tasks.measure(tasks.Embedded(encode, given), given, dims)}
    path = arguments.out / "static-bag.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1))
    print(*(f"{key:45}{value}" for key, value in results.items()), sep="\n")


if __name__ == "__main__":
    main()
