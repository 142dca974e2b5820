"""How fast does a language model become an embedding model here, beside sentence-transformers' own trainer, and beside
transformers' model in a loop of one's own? Same weights, pairs and batches.

    python benchmarks/finetune.py CONFIG [--section.key=value ...] [--steps 12] [--minutes M] [--compiled]
        [--by_hand] [--tasks FILE] [--out DIR]

CONFIG has a weak stage; without an init_from the weights are drawn. First each trains so many steps: seconds a step
(the median without the first quarter), tokens a second (those of the texts; what a peer pads is not counted) and, on a
GPU, peak memory. Then, with --minutes, sentence-transformers trains for so long, ours on as many pairs and ours for as
long; of each the nDCG@10 of the held-out docs. Sentence-transformers: CachedMultipleNegativesRankingLoss in
MatryoshkaLoss, SDPA, bidirectional; --compiled: with torch.compile, too. --by_hand: transformers' model, with gradient
caching over chunks that are each padded to their longest text. All multiply in the same precision. Writes
finetune.json, a row a training, into DIR (runs/benchmarks), and goes on behind the rows that are there; works in
DIR/finetune. Needs `pip install sentence-transformers accelerate datasets`.
"""

import json
import shutil
import statistics
import time

import measured
import torch
import training
from stages import at_start

from conan_engine import command, stages
from conan_engine.data import datasets
from conan_engine.data.tokenizer import Tokenizer
from conan_engine.evaluation import tasks
from conan_engine.evaluation.encoder import Encoder
from conan_engine.export import sentence_transformers as export
from conan_engine.parallel import precision
from conan_engine.parallel.mesh import Mesh
from conan_engine.settings import load
from conan_kernels.info_nce.reference import info_nce_reference


class Bench:
    def __init__(self, path, settings, folder):
        self.path = path
        self.folder = folder
        self.settings = [*settings, "--stages=['weak']", "--validation.data={}", "--save_every=1000000"]
        self.config = load(path, [*self.settings, f"--out_dir={folder}/start"])
        self.mesh = Mesh(self.config.device)
        self.cuda = self.mesh.device.type == "cuda"
        shutil.rmtree(folder / "start/model", ignore_errors=True)  # it may be another config's
        self.tokenizer, self.shards, _ = datasets.prepare(self.config)
        self.precision, _ = precision.choose(self.config, self.mesh)
        self.settings.append(f"--precision={self.precision}")

    def batches(self, steps):
        """The texts of so many steps, [(query, document), ...], as our weak stage draws them, and how many tokens they
        have."""
        stage, tokens, texts = stages.make("weak", self.config, self.shards, self.mesh.data), 0, []
        for _ in range(steps):
            batch, _ = stage.draw()
            ids, edges = batch.tokens.cpu().numpy(), batch.cu_seqlens.tolist()
            decoded = [self.tokenizer.decode(ids[start:end]) for start, end in zip(edges, edges[1:])]
            texts += zip(decoded[: len(decoded) // 2], decoded[len(decoded) // 2 :])
            tokens += len(ids)
        stage.close()
        return texts, tokens

    def ours(self, steps):
        """(seconds of each step, peak bytes, encode) of a run of ours."""
        run = self.folder / "ours"
        shutil.rmtree(run, ignore_errors=True)
        peak = self.fresh_memory()
        training.run(self.path, run, *self.settings, f"--weak.steps={steps}", share=self.folder / "start")
        peak = peak()
        seconds = [row["seconds"] for row in _lines(run / "metrics.jsonl")]
        return seconds, peak, Encoder.load(run).encode

    def theirs(self, texts, steps, compiled=False):
        """The same of sentence-transformers'."""
        from datasets import Dataset
        from sentence_transformers import (
            SentenceTransformer,
            SentenceTransformerTrainer,
            SentenceTransformerTrainingArguments,
        )
        from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
        from transformers import TrainerCallback

        class InOrder(SentenceTransformerTrainer):
            def get_batch_sampler(self, dataset, batch_size, *_, **__):
                return torch.utils.data.BatchSampler(
                    torch.utils.data.SequentialSampler(dataset), batch_size, drop_last=True
                )

        class Clock(TrainerCallback):
            def __init__(self, settle):
                self.seconds, self.settle, self.began = [], settle, None

            def on_step_begin(self, *_, **__):
                self.settle()
                self.began = time.perf_counter()

            def on_step_end(self, *_, **__):
                self.settle()
                self.seconds.append(time.perf_counter() - self.began)

        weak, folder = self.config.weak, self.exported()
        peak = self.fresh_memory()
        model = SentenceTransformer(
            str(folder), device=str(self.mesh.device), model_kwargs={"attn_implementation": "sdpa"}
        )
        model.max_seq_length = weak.max_tokens
        loss = CachedMultipleNegativesRankingLoss(
            model,
            scale=1 / weak.temperature,
            mini_batch_size=weak.chunk or weak.batch,
            mini_batch_num_tokens=weak.chunk_tokens or None,
        )
        loss = MatryoshkaLoss(model, loss, weak.dims or [self.config.model.width])
        clock = Clock(self.settle)
        options = SentenceTransformerTrainingArguments(
            str(self.folder / "theirs"), per_device_train_batch_size=weak.batch, max_steps=steps, learning_rate=weak.lr,
            warmup_steps=round(weak.warmup * steps),
            lr_scheduler_type="linear", weight_decay=weak.weight_decay, max_grad_norm=weak.clip,
            bf16=self.precision == "bfloat16", use_cpu=not self.cuda, torch_compile=compiled,
            dataloader_num_workers=4 if self.cuda else 0, save_strategy="no", report_to="none", logging_steps=1000,
            disable_tqdm=True,
        )  # fmt: skip
        pairs = Dataset.from_dict(
            {"anchor": [query for query, _ in texts], "positive": [document for _, document in texts]}
        )
        InOrder(model, options, pairs, loss=loss, callbacks=[clock]).train()
        peak = peak()
        model.max_seq_length = self.config.model.context
        return clock.seconds, peak, lambda given: model.encode(given, batch_size=128, normalize_embeddings=True)

    def by_hand(self, texts, steps):
        """The same of transformers' model in a loop of one's own."""
        from transformers import AutoModel, AutoTokenizer

        weak, folder = self.config.weak, self.exported()
        peak = self.fresh_memory()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
        model.to(self.mesh.device).train()
        optimizer = torch.optim.AdamW(model.parameters(), weak.lr, weight_decay=weak.weight_decay, fused=True)
        dims = weak.dims or [self.config.model.width]
        right = torch.arange(weak.batch, device=self.mesh.device)

        def embed(chunk):
            given = tokenizer(chunk, padding=True, truncation=True, max_length=weak.max_tokens, return_tensors="pt")
            given = given.to(self.mesh.device)
            with torch.autocast(self.mesh.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                hidden = model(**given).last_hidden_state.float()
            own = given["attention_mask"][..., None]
            return (hidden * own).sum(1) / own.sum(1)

        seconds = []
        for step in range(steps):
            self.settle()
            began = time.perf_counter()
            pairs = texts[step * weak.batch : (step + 1) * weak.batch]
            both = [query for query, _ in pairs] + [document for _, document in pairs]
            size = weak.chunk or len(both)
            chunks = [both[start : start + size] for start in range(0, len(both), size)]
            with torch.no_grad():
                vectors = torch.cat([embed(chunk) for chunk in chunks]).requires_grad_()
            info_nce_reference(*vectors.chunk(2), right, weak.temperature, dims=dims).loss.backward()
            for chunk, gradient in zip(chunks, vectors.grad.split(size)):
                embed(chunk).backward(gradient)
            torch.nn.utils.clip_grad_norm_(model.parameters(), weak.clip)
            optimizer.step()
            optimizer.zero_grad()
            self.settle()
            seconds.append(time.perf_counter() - began)
        return seconds, peak(), None

    def exported(self):
        """The folder of the weights that all start with, for transformers."""
        folder, weak = self.folder / "start/model", self.config.weak
        if not folder.exists():
            # its rows are of an earlier start; the export takes its card from a run
            if not (self.folder / "ours").exists():
                self.ours(2)
            start = at_start(self.config, self.mesh)
            folder.mkdir(parents=True)
            export.write(
                folder,
                self.folder / "ours",
                Encoder(start.model, Tokenizer.load(Tokenizer.of(self.folder / "start")), weak.max_tokens, weak.dims),
                "float32",
            )
        return folder

    def settle(self):
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def fresh_memory(self):
        """A function that says the peak since now, in bytes; None without a GPU."""
        if not self.cuda:
            return lambda: None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated


def _lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main():
    parser = measured.Parser(__doc__, quick={"steps": 3})
    parser.add_argument("config")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--by_hand", action="store_true")
    parser.add_argument("--tasks", metavar="FILE")
    arguments, settings = parser.parse_known_args()
    bench = Bench(arguments.config, settings, arguments.out / "finetune")
    weak = bench.config.weak
    about = {
        "commit": measured.commit(),
        "machine": measured.machine(bench.mesh.device.type),
        "versions": measured.versions("torch", "triton", "transformers", "sentence-transformers"),
    }
    case = {
        "config": arguments.config,
        "settings": settings,
        "data": list(weak.data),
        "precision": bench.precision,
        "batch": weak.batch,
        "chunk": weak.chunk,
        "chunk_tokens": weak.chunk_tokens,
        "max_tokens": weak.max_tokens,
    }
    rows = measured.Rows(arguments.out / "finetune.json", about)
    texts, tokens = bench.batches(arguments.steps)

    def add(name, what, steps, train_it, given=None):
        """A row of one training, unless it is there; the seconds that a step takes."""
        row = rows.find(trainer=name, question=what, **case)
        if row is None:
            seconds, peak, encode = train_it(steps)
            row = {
                **case,
                "trainer": name,
                "question": what,
                "steps": steps,
                "pairs": steps * weak.batch,
                "peak_bytes": peak,
                "seconds": sum(seconds),
            }
            row["seconds_a_step"] = statistics.median(seconds[len(seconds) // 4 :])
            if what == "rate":
                row |= {"tokens": tokens / steps, "tokens_per_s": tokens / steps / row["seconds_a_step"]}
            if given:
                row["docs.ndcg@10"] = given.score(tasks.Embedded(encode, {"docs": given}))
            rows.add(row)
        said = (
            f"{row['docs.ndcg@10']:.3f} docs nDCG@10"
            if "docs.ndcg@10" in row
            else f"{row['tokens_per_s']:,.0f} tokens/s"
        )
        print(
            f"{name}, {what}: {row['steps']} steps, {row['seconds_a_step']:.3f} s each, {said}"
            + (f", {row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else ""),
            flush=True,
        )
        return row["seconds_a_step"]

    ours = add("ours", "rate", arguments.steps, bench.ours)
    theirs = add("sentence-transformers", "rate", arguments.steps, lambda steps: bench.theirs(texts, steps))
    if arguments.by_hand:
        add("transformers, by hand", "rate", arguments.steps, lambda steps: bench.by_hand(texts, steps))
    if arguments.minutes:
        docs = tasks.load(arguments.tasks)["docs.ndcg@10"]
        many = max(2, round(60 * arguments.minutes / theirs))
        add("ours", "as many pairs", many, bench.ours, docs)
        add(
            "sentence-transformers",
            "as many pairs",
            many,
            lambda steps: bench.theirs(bench.batches(steps)[0], steps),
            docs,
        )
        add("ours", "as many minutes", max(2, round(60 * arguments.minutes / ours)), bench.ours, docs)
    if arguments.compiled:
        add(
            "sentence-transformers, compiled",
            "rate",
            arguments.steps,
            lambda steps: bench.theirs(texts, steps, compiled=True),
        )


if __name__ == "__main__":
    command.run(main)
