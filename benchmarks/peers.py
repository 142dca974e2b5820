"""What do models that others have trained score on the held-out tasks? Of sentence-transformers, or a language model as
it came.

    python benchmarks/peers.py [NAME=]MODEL ... [--tasks FILE] [--device cpu] [--out runs/benchmarks]

MODEL is a folder of sentence-transformers; or a language model that `--init_from` takes (a transformers folder, a .gguf
file), whose last hidden states are averaged over a text's tokens, once causal and once bidirectional. Texts are cut to
512 tokens, or to what the model says. Prints the scores and writes peers.json, a row a model; the same command again
goes on behind the rows that are there. --tasks: a file of gpu/pack.py, where the packages with the texts are not
installed.
"""

import functools
import time
from pathlib import Path

import measured

from conan_engine import command
from conan_engine.config import Config
from conan_engine.data.tokenizer import Tokenizer
from conan_engine.evaluation import tasks
from conan_engine.evaluation.encoder import Encoder
from conan_engine.evaluation.scores import NAMES
from conan_engine.model.pretrained import adopt
from conan_engine.model.transformer import Transformer
from conan_engine.parallel.device import choose
from conan_engine.run import checkpoint

MOST = 512  # tokens of a text


def of_sentence_transformers(name, path, device):
    """{name of the row: (encode, parameters, tokens of a text at most)}"""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(path), device=str(device))
    model.max_seq_length = min(MOST, model.max_seq_length or MOST)
    encode = functools.partial(model.encode, batch_size=128, normalize_embeddings=True, show_progress_bar=False)
    return {name: (encode, sum(p.numel() for p in model.parameters()), model.max_seq_length)}


def of_language_model(name, path, device):
    config = Config(init_from=str(path))
    adopt(config, set(), "peers.py")
    tokenizer = Tokenizer.load(config.tokenizer.path)
    model = Transformer(config.model, tokenizer.vocab_size, "auto" if device.type == "cuda" else "float32").to(device)
    checkpoint.start_from(config.init_from, model, tokenizer)
    model.lm_head = None
    about, most = sum(p.numel() for p in model.parameters()), min(MOST, config.model.context)
    return {
        f"{name}, {mask}": (Encoder(model, tokenizer, most, [], alpha).encode, about, most)
        for mask, alpha in (("causal", 0.0), ("bidirectional", 1.0))
    }


def main():
    parser = measured.Parser(__doc__, device=True)
    parser.add_argument("models", nargs="+", metavar="[NAME=]MODEL")
    parser.add_argument("--tasks", metavar="FILE")
    arguments = parser.parse_args()
    given = tasks.load(arguments.tasks)
    rows = measured.Rows(
        arguments.out / "peers.json", {"commit": measured.commit(), "machine": measured.machine(arguments.device)}
    )
    for text in arguments.models:
        name, _, path = text.rpartition("=")
        path = Path(path)
        models = of_sentence_transformers if (path / "modules.json").exists() else of_language_model
        for model, (encode, parameters, most) in models(name or path.name, path, choose(arguments.device)).items():
            if rows.find(model=model):
                continue
            began = time.perf_counter()
            scores = tasks.measure(tasks.Embedded(encode, given), given, ())
            rows.add(
                {
                    "model": model,
                    "parameters": parameters,
                    "tokens": most,
                    "seconds": time.perf_counter() - began,
                    **scores,
                }
            )
            print(name, *(f"  {NAMES[key]:28}{rows.find(model=model)[key]:.3f}" for key in given), sep="\n", flush=True)


if __name__ == "__main__":
    command.run(main)
