"""The two data sets of loader.py, and what it measures on them: our loader and its peers.

Each form of reading is a generator that yields, for every batch, its number of tokens.
"""

import contextlib
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from conan_engine.data.loader import Loader
from conan_engine.data.shard_writer import ShardWriter
from conan_engine.data.shards import Shards

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
