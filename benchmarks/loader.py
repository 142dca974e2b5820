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

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import measured
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from conan_engine.data.loader import Loader
from conan_engine.data.shards import Shards, ShardWriter

ROWS, BLOCK, PAIRS = 64, 1024, 256
VOCAB = 50_304  # two bytes a token


class Alone(NamedTuple):
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")


def write_texts(folder, tokens, rng):
    """Texts of 600 tokens at the median, in shards and, end to end, in train.bin; -> the number of tokens."""
    folder.mkdir(parents=True)
    written = 0
    with (
        ShardWriter(folder / "shards", kind="text", tokenizer_hash="00" * 32, vocab_size=VOCAB) as writer,
        open(folder / "train.bin", "wb") as plain,
    ):
        while written < tokens:
            text = rng.integers(0, VOCAB, int(np.clip(rng.lognormal(6.4, 1.0), 16, 20_000)), dtype=np.uint16)
            writer.add([text])
            text.tofile(plain)
            written += len(text)
    return written


def write_pairs(folder, records, rng):
    """Queries and documents in shards and, end to end, in pairs.bin with pairs.npy: int64 [2 * records + 1], where each
    begins."""
    folder.mkdir(parents=True)
    lengths = np.stack((rng.integers(16, 49, records), rng.integers(64, 257, records)), axis=1)
    with (
        ShardWriter(folder / "shards", kind="pairs", tokenizer_hash="00" * 32, vocab_size=VOCAB) as writer,
        open(folder / "pairs.bin", "wb") as plain,
    ):
        for pair in lengths:
            fields = [rng.integers(0, VOCAB, length, dtype=np.uint16) for length in pair]
            writer.add(fields)
            np.concatenate(fields).tofile(plain)
    np.save(folder / "pairs.npy", np.concatenate(([0], np.cumsum(lengths.ravel()))))


# ---- each yields, for every batch, its number of tokens


def ours(folder, threads, **options):
    stream = Loader({"a": Shards(folder / "shards")}, {"a": 1.0}, seed=0, group=Alone(), threads=threads, **options)
    with contextlib.closing(stream):
        while True:
            yield len(stream.next().tokens)


def memcpy(bytes_a_token, tokens):
    source = np.ones(bytes_a_token * tokens, np.uint8)
    targets = [np.ones(bytes_a_token * tokens, np.uint8) for _ in range(4)]
    while True:
        for target in targets:
            np.copyto(target, source)
            yield tokens


def nanogpt(folder):
    """get_batch as nanoGPT has it: the memmap opened anew for each batch, lest it leak."""
    while True:
        data = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - BLOCK, (ROWS,))
        x = torch.stack([torch.from_numpy(data[i : i + BLOCK].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + BLOCK].astype(np.int64)) for i in starts])
        yield min(x.numel(), y.numel())


class Blocks(Dataset):
    def __init__(self, folder):
        self.data = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r")

    def __len__(self):
        return (len(self.data) - 1) // BLOCK

    def __getitem__(self, i):
        block = torch.from_numpy(self.data[i * BLOCK : (i + 1) * BLOCK + 1].astype(np.int64))
        return block[:-1], block[1:]


class Pairs(Dataset):
    def __init__(self, folder):
        self.data = np.memmap(folder / "pairs.bin", dtype=np.uint16, mode="r")
        self.starts = np.load(folder / "pairs.npy")

    def __len__(self):
        return len(self.starts) // 2

    def __getitem__(self, i):
        a, b, c = self.starts[2 * i : 2 * i + 3]
        return {"query": self.data[a:b], "document": self.data[b:c]}


def pack(pairs):
    fields = [torch.from_numpy(pair[key].astype(np.int32)) for key in ("query", "document") for pair in pairs]
    lengths = torch.tensor([len(field) for field in fields])
    return torch.cat(fields), torch.cat((torch.zeros(1), lengths.cumsum(0))).int()


def blocks_to_int64(items):
    whole = torch.from_numpy(np.stack([item["tokens"] for item in items]).astype(np.int64))
    return whole[:, :-1], whole[:, 1:]


def forever(loader):
    while True:
        for first, _ in loader:
            yield first.numel()


def in_process_pairs(folder):
    data, rng = Pairs(folder), np.random.default_rng()
    while True:
        yield len(pack([data[i] for i in rng.integers(0, len(data), PAIRS)])[0])


def dataloader(dataset, batch, collate=None):
    return forever(
        DataLoader(
            dataset,
            batch_size=batch,
            shuffle=True,
            num_workers=2,
            collate_fn=collate,
            persistent_workers=True,
            drop_last=True,
        )
    )


def write_mds(dataset, columns, folder):
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns=columns) as writer:
        for item in dataset:
            writer.write(item)


def mosaic(folder, batch, collate):
    import streaming

    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=batch)
    return forever(
        DataLoader(
            dataset, batch_size=batch, num_workers=2, collate_fn=collate, persistent_workers=True, drop_last=True
        )
    )


def write_lit(dataset, folder):
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for i, item in enumerate(dataset):
        writer[i] = item
    writer.done()
    writer.merge(1)


def lit(folder, batch, collate):
    from litdata import StreamingDataLoader, StreamingDataset

    return forever(
        StreamingDataLoader(
            StreamingDataset(str(folder), shuffle=True),
            batch_size=batch,
            num_workers=2,
            collate_fn=collate,
            drop_last=True,
        )
    )


def as_dicts(blocks):
    for i in range(len(blocks)):
        yield {"tokens": np.asarray(blocks.data[i * BLOCK : (i + 1) * BLOCK + 1])}


def forms(folder):
    """case -> {name: batches}; a peer that is not installed is left out, and a line says so."""
    texts, pairs = folder / "texts", folder / "pairs"
    cases = {
        "rows": {
            "ours, 1 thread": ours(texts, 1, kind="text", shape="rows", batch=ROWS, max_tokens=BLOCK),
            "ours, 2 threads": ours(texts, 2, kind="text", shape="rows", batch=ROWS, max_tokens=BLOCK),
            "memcpy": memcpy(13, ROWS * BLOCK),
            "nanoGPT get_batch": nanogpt(texts),
            "DataLoader, 2 workers": dataloader(Blocks(texts), ROWS),
        },
        "pairs": {
            "ours, 1 thread": ours(pairs, 1, kind="pairs", shape="records", batch=PAIRS),
            "ours, 2 threads": ours(pairs, 2, kind="pairs", shape="records", batch=PAIRS),
            "memcpy": memcpy(8, PAIRS * 192),
            "memmap, in process": in_process_pairs(pairs),
            "DataLoader, 2 workers": dataloader(Pairs(pairs), PAIRS, pack),
        },
    }
    columns = {
        "rows": {"tokens": f"ndarray:uint16:{BLOCK + 1}"},
        "pairs": {"query": "ndarray:uint16", "document": "ndarray:uint16"},
    }
    for case, items, batch, collate in (
        ("rows", lambda: as_dicts(Blocks(texts)), ROWS, blocks_to_int64),
        ("pairs", lambda: map(Pairs(pairs).__getitem__, range(len(Pairs(pairs)))), PAIRS, pack),
    ):
        try:
            write_mds(items(), columns[case], folder / f"mds-{case}")
            cases[case]["mosaicml-streaming, 2 workers"] = mosaic(folder / f"mds-{case}", batch, collate)
        except ImportError as error:
            print(f"mosaicml-streaming is left out: {error}")
        try:
            write_lit(items(), folder / f"lit-{case}")
            cases[case]["litdata, 2 workers"] = lit(folder / f"lit-{case}", batch, collate)
        except ImportError as error:
            print(f"litdata is left out: {error}")
    return cases


def rate(batches, seconds):
    """Tokens and batches a second, after a quarter of the time to warm up."""
    until = time.perf_counter() + seconds / 4
    while time.perf_counter() < until:
        next(batches)
    tokens, count, start = 0, 0, time.perf_counter()
    while (now := time.perf_counter()) < start + seconds:
        tokens, count = tokens + next(batches), count + 1
    return tokens / (now - start), count / (now - start)


def measure(forms, seconds, rounds):
    found = {name: [] for name in forms}
    for _ in range(rounds):
        for name, batches in forms.items():
            found[name].append(rate(batches, seconds))
    for batches in forms.values():
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
from loader import Alone, BLOCK, ROWS, Loader, Path, Shards
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
