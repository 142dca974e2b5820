"""How fast are a million texts encoded? Ours beside sentence-transformers, with the same weights and texts.

    python benchmarks/encode.py RUN [--texts 1_000_000] [--beside 50_000] [--tasks FILE] [--out runs/benchmarks]

Texts are pieces of those that the evaluation holds out: "mixed", 1 to 400 words each, 30 in the median (log-normal),
and "equal", 64 words each. Ours encodes so many of the mixed ones; beside the peer --beside of either kind, best of
two. The peer has its own batch size of 32 and 256 too, and on a GPU bfloat16, in which ours computes there. Seconds are
from the first text to the last vector; cosine: the lowest with ours. Prints a table and writes encode.json, a row a
measurement; the same command again goes on behind the rows that are there. --tasks: a file of gpu/pack.py.
"""

import itertools
import tempfile
import time
from pathlib import Path

import measured
import numpy as np
import torch

from conan_engine import command
from conan_engine.evaluation import tasks
from conan_engine.evaluation.encoder import Encoder
from conan_engine.export import sentence_transformers as export

MEDIAN, MOST, EQUAL = 30, 400, 64  # words


def pieces(words, lengths, chance):
    """A text of each length, from somewhere in a list of words."""
    starts = chance.integers(len(words) - lengths.max(), size=len(lengths))
    return [" ".join(words[start : start + length]) for start, length in zip(starts.tolist(), lengths.tolist())]


def peer(run, encoder, dtype, batch):
    from sentence_transformers import SentenceTransformer

    with tempfile.TemporaryDirectory() as folder:
        export.write(Path(folder), run, encoder, dtype)
        model = SentenceTransformer(
            folder,
            device=str(encoder.model.embedding.device),
            model_kwargs={"dtype": dtype, "attn_implementation": "sdpa"},
        )
    return lambda texts: model.encode(texts, batch_size=batch, show_progress_bar=False)


def seconds_of(encode, texts):
    began = time.perf_counter()
    vectors = encode(texts)
    return time.perf_counter() - began, vectors


def main():
    parser = measured.Parser(__doc__, quick={"texts": 2000, "beside": 500})
    parser.add_argument("run", help="a run folder, such as runs/smollm")
    parser.add_argument("--texts", type=int, default=1_000_000)
    parser.add_argument("--beside", type=int, default=50_000)
    parser.add_argument("--tasks", metavar="FILE")
    arguments = parser.parse_args()
    encoder, chance = Encoder.load(arguments.run), np.random.default_rng(0)
    device = encoder.model.embedding.device.type
    words = " ".join(
        itertools.chain.from_iterable(task.texts() for task in tasks.load(arguments.tasks).values())
    ).split()
    lengths = np.clip(
        np.exp(chance.normal(np.log(MEDIAN), 1, max(arguments.texts, arguments.beside))).astype(int), 1, MOST
    )
    given = {"mixed": pieces(words, lengths, chance), "equal": pieces(words, np.full(arguments.beside, EQUAL), chance)}
    about = {
        "commit": measured.commit(),
        "machine": measured.machine(device),
        "run": arguments.run,
        "parameters": sum(p.numel() for p in encoder.model.parameters()),
    }
    rows = measured.Rows(
        arguments.out / "encode.json",
        about | {"versions": measured.versions("torch", "triton", "transformers", "sentence-transformers")},
    )

    def measure(kind, form, make, texts, rounds):
        row = rows.find(lengths=kind, form=form, texts=len(texts))
        if row is None:
            encode = make()
            encode(texts[:256])  # compiles what it needs
            seconds, vectors = min((seconds_of(encode, texts) for _ in range(rounds)), key=lambda found: found[0])
            tokens = sum(map(len, encoder.tokenizer.encode_texts(texts, encoder.max_tokens)))
            row = {
                "lengths": kind,
                "form": form,
                "texts": len(texts),
                "tokens": tokens,
                "seconds": seconds,
                "texts_per_s": len(texts) / seconds,
                "tokens_per_s": tokens / seconds,
            }
            if form != "ours":
                some = texts[:1000]
                row["lowest_cosine"] = float((encoder.encode(some) * vectors[: len(some)]).sum(1).min())
            rows.add(row)
        cosine = f"  cosine {row['lowest_cosine']:.5f}" if "lowest_cosine" in row else ""
        print(
            f"{kind:7}{form:44}{row['texts']:10,} texts{row['texts_per_s']:12,.0f} "
            f"texts/s{row['tokens_per_s']:13,.0f} tokens/s{cosine}",
            flush=True,
        )

    for kind in ("mixed", "equal"):
        texts = given[kind][: arguments.beside]
        measure(kind, "ours", lambda: encoder.encode, texts, 2)
        for dtype, batch in itertools.product(("bfloat16", "float32") if device == "cuda" else ("float32",), (32, 256)):
            measure(
                kind,
                f"sentence-transformers, {dtype}, batches of {batch}",
                lambda: peer(arguments.run, encoder, dtype, batch),
                texts,
                2,
            )
    torch.cuda.empty_cache()
    measure("mixed", "ours", lambda: encoder.encode, given["mixed"][: arguments.texts], 1)


if __name__ == "__main__":
    command.run(main)
