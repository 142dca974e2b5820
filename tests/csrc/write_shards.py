"""Shards for the fuzzer, one of each kind and token width: python write_shards.py FOLDER"""

import shutil
import sys
from pathlib import Path

import numpy as np

from conan_engine.data.shard_writer import ShardWriter

folder = Path(sys.argv[1])
shutil.rmtree(folder, ignore_errors=True)
rng = np.random.default_rng()
for kind, fields in (("text", (1, 2)), ("instruction", (3, 4)), ("pairs", (2, 5))):
    for vocab_size in (50_000, 150_000):
        with ShardWriter(
            folder / f"{kind}-{vocab_size}", kind=kind, tokenizer_hash="ab" * 32, vocab_size=vocab_size
        ) as writer:
            for _ in range(200):
                writer.add(
                    [rng.integers(0, vocab_size, rng.integers(1, 90)) for _ in range(rng.integers(*fields))],
                    rng.random(),
                    int(rng.integers(2**40)),
                )
