"""Vectors for your own texts: `python -m conan_engine.encode RUN FILE.jsonl OUT.npy --dim 256`. Row i is line i's text."""

import argparse
from pathlib import Path

import numpy as np

from conan_engine import errors
from conan_engine.data.encoding import join
from conan_engine.data.sources import files
from conan_engine.encoder import Encoder
from conan_engine.errors import UserError
from conan_engine.search import save_beside


def text_of(record, path):
    """What of a record is embedded: its text, its query, or its instruction and input."""
    if "text" in record:
        return record["text"]
    if "query" in record:
        return record["query"]
    if "instruction" in record:
        return join(record["instruction"], record["input"])
    raise UserError(f"{path}: holds sentence pairs; encode takes {{\"text\"}}, {{\"query\"}} or {{\"instruction\"}} records")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run folder, such as runs/demo")
    parser.add_argument("file", help="JSON Lines (.jsonl, .jsonl.gz) or Parquet")
    parser.add_argument("out", help="a .npy file: float32 [records, dim], unit vectors")
    parser.add_argument("--dim", type=int, help="Matryoshka: only the first DIM numbers (default: all)")
    arguments = parser.parse_args()
    encoder = Encoder.load(arguments.run)
    width = encoder.model.config.width
    if arguments.dim is not None and not 1 <= arguments.dim <= width:
        raise UserError(f"--dim is {arguments.dim}; this model has 1 to {width}")
    if not Path(arguments.out).absolute().parent.is_dir():  # before hours of work, not after
        raise UserError(f"{arguments.out}: its folder does not exist; make it, or name another")
    vectors = encoder.encode([text_of(record, arguments.file) for _, record in files.read(arguments.file)], arguments.dim)
    save_beside(arguments.out, lambda file: np.save(file, vectors))
    print(f"{arguments.out}: float32 {list(vectors.shape)}")


if __name__ == "__main__":
    errors.run(main)
