"""How fast do batches come, beside what people use today? Tokens and records a second, the page cache warm.

    python benchmarks/loader.py [--tokens 100_000_000] [--seconds 2] [--rounds 5] [--run RUN] [--gigabytes 10]

Language modelling: 64 rows of 1,024 tokens. Pairs: 256 queries and documents of 16 to 48 and 64 to 256 tokens, packed.
Ours with one and two threads, beside nanoGPT's get_batch over a memmap, a PyTorch DataLoader with two workers over the
same memmap, and mosaicml-streaming and litdata, two workers each, where they are installed. The measure of all is
memcpy: one thread copying a batch's bytes as ours delivers them (token, position, target, mask: 13 bytes a token;
pairs: 8). Everything is measured in turn, `rounds` times; a ratio is the median over the rounds.

Also: the time to open 10,000 shards and draw from them; the memory of a small data set beside that of one of
`--gigabytes`; and, with --run, what share of a training run's time was spent waiting for data (its metrics.jsonl).
Prints tables; writes loader.json to runs/benchmarks. The data is random and is deleted at the end.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measured
import numpy as np
from loader_forms import PAIRS, VOCAB, Alone, forms, write_pairs, write_texts

from conan_engine.data.loader import Loader
from conan_engine.data.shard_writer import ShardWriter
from conan_engine.data.shards import Shards


def rate(batches, seconds):
    """Tokens and batches a second, after a quarter of the time to warm up."""
    until = time.perf_counter() + seconds / 4
    while time.perf_counter() < until:
        next(batches)
    tokens, count, start = 0, 0, time.perf_counter()
    while (now := time.perf_counter()) < start + seconds:
        tokens, count = tokens + next(batches), count + 1
    return tokens / (now - start), count / (now - start)


def measure(readers, seconds, rounds):
    found = {name: [] for name in readers}
    for _ in range(rounds):
        for name, batches in readers.items():
            found[name].append(rate(batches, seconds))
    for batches in readers.values():
        batches.close()
    return {
        name: {
            "tokens_per_s": statistics.median(tokens for tokens, _ in rates),
            "batches_per_s": statistics.median(batches for _, batches in rates),
            "of_memcpy": statistics.median(tokens / limit for (tokens, _), (limit, _) in zip(rates, found["memcpy"])),
            "ours_1_thread_is_times": statistics.median(
                first / tokens for (tokens, _), (first, _) in zip(rates, found["ours, 1 thread"])
            ),
        }
        for name, rates in found.items()
    }


def ten_thousand_shards(folder):
    """Seconds to open them (best and worst of five), and to the first batch."""
    with ShardWriter(folder, kind="pairs", tokenizer_hash="00" * 32, vocab_size=VOCAB, shard_bytes=1) as writer:
        for i in range(10_000):
            writer.add([[i], [i, i]])
    opened, drawn = [], []
    for _ in range(5):
        start = time.perf_counter()
        shards = Shards(folder)
        opened.append(time.perf_counter() - start)
        stream = Loader(
            {"a": shards}, {"a": 1.0}, kind="pairs", shape="records", batch=PAIRS, seed=0, group=Alone(), threads=2
        )
        stream.next()
        drawn.append(time.perf_counter() - start)
        stream.close()
    return {"open_s": min(opened), "open_s_worst": max(opened), "first_batch_s": min(drawn)}


MEMORY = """
import sys
from pathlib import Path

from loader_forms import BLOCK, ROWS, Alone, Loader, Shards
shards = Shards(Path(sys.argv[1]))
stream = Loader({"a": shards}, {"a": 1.0}, kind="text", shape="rows", batch=ROWS, max_tokens=BLOCK,
                seed=0, group=Alone(), threads=2)
for _ in range(2000):
    stream.next()
stream.close()
status = dict(line.split(":") for line in open("/proc/self/status"))
print(shards.tokens, *(int(status[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile")))
"""


def memory(folder):
    """Bytes after 2,000 batches in a process of its own: its own memory, and the pages of the files that it has
    mapped."""
    command = [sys.executable, "-c", MEMORY, str(folder / "shards")]
    tokens, own, mapped = map(
        int,
        subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split(),
    )
    return {"tokens": tokens, "own_bytes": own, "mapped_bytes": mapped}


def waiting(run):
    """stage -> share of its time that the training loop waited for data."""
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    stages = dict.fromkeys(row["stage"] for row in rows)
    return {
        s: sum(r["waited"] for r in rows if r["stage"] == s) / sum(r["seconds"] for r in rows if r["stage"] == s)
        for s in stages
    }


def main():
    parser = measured.Parser(__doc__, quick={"tokens": 2_000_000, "seconds": 0.3, "rounds": 1})
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", help="a training run's folder")
    parser.add_argument(
        "--gigabytes", type=float, default=0.0, help="also measure memory on so many of synthetic tokens"
    )
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    result = {
        "commit": measured.commit(),
        "machine": measured.processor(),
        "cores": os.cpu_count(),
        "versions": measured.versions("torch", "mosaicml-streaming", "litdata"),
    }
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out))
    try:
        write_texts(folder / "texts", arguments.tokens, rng)
        write_pairs(folder / "pairs", arguments.tokens // 192, rng)
        for case, batches in forms(folder).items():
            result[case] = measure(batches, arguments.seconds, arguments.rounds)
            print(f"\n{case:32}{'Mtokens/s':>10}{'batches/s':>11}{'of memcpy':>11}{'ours, 1 thread, is':>20}")
            for name, row in result[case].items():
                print(
                    f"{name:32}{row['tokens_per_s'] / 1e6:10.1f}{row['batches_per_s']:11.1f}"
                    f"{row['of_memcpy']:10.1%}{row['ours_1_thread_is_times']:18.1f} "
                    "x"
                )
        result["10,000 shards"] = ten_thousand_shards(folder / "many")
        print(f"\n10,000 shards: {result['10,000 shards']}")
        result["memory"] = [memory(folder / "texts")]
        if arguments.gigabytes:
            write_texts(folder / "large", int(arguments.gigabytes * 1e9 / 2), rng)
            result["memory"].append(memory(folder / "large"))
        for row in result["memory"]:
            print(
                f"{row['tokens'] * 2 / 1e9:.2f} GB of tokens: {row['own_bytes'] / 2**20:.0f} MiB of its own, "
                f"{row['mapped_bytes'] / 2**20:.0f} MiB of mapped files"
            )
        if arguments.run:
            result["waiting"] = waiting(arguments.run)
            print(
                "waiting for data, share of the step: "
                + ", ".join(f"{stage} {share:.2%}" for stage, share in result["waiting"].items())
            )
        (out / "loader.json").write_text(json.dumps(result, indent=1))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
