"""Vectors for your own texts: `python -m conan_engine.encode RUN FILE OUT.npy --dim 256`. Row i is record i's text."""

import argparse
from pathlib import Path

import numpy as np

from conan_engine import __version__, errors
from conan_engine.data.encoding import join
from conan_engine.data.sources import files
from conan_engine.encoder import Encoder
from conan_engine.errors import UserError
from conan_engine.search import save_beside


def text_of(record, source):
    """What of a record is embedded: its text, its query, or its instruction and input."""
    if "text" in record:
        return record["text"]
    if "query" in record:
        return record["query"]
    if "instruction" in record:
        return join(record["instruction"], record["input"])
    raise UserError(f"{source}: holds sentence pairs; encode takes {{\"text\"}}, {{\"query\"}} or {{\"instruction\"}} records")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--version", action="version", version=f"conan-engine {__version__}")
    parser.add_argument("run", help="a run folder, such as runs/demo")
    parser.add_argument("file", help=f"{files.ENDINGS}; - for standard input, JSON Lines or a text a line")
    parser.add_argument("out", help="a .npy file: float32 [records, dim], unit vectors")
    parser.add_argument("--dim", type=int, help="Matryoshka: only the first DIM numbers (default: all)")
    arguments = parser.parse_args()
    encoder = Encoder.load(arguments.run)
    width = encoder.model.config.width
    if arguments.dim is not None and not 1 <= arguments.dim <= width:
        raise UserError(f"--dim is {arguments.dim}; this model has 1 to {width}")
    if not Path(arguments.out).absolute().parent.is_dir():  # before hours of work, not after
        raise UserError(f"{arguments.out}: its folder does not exist; make it, or name another")
    source, records = ("standard input", files.read_standard_input()) if arguments.file == "-" else (arguments.file, files.read(arguments.file))
    vectors = encoder.encode([text_of(record, source) for _, record in records], arguments.dim)
    save_beside(arguments.out, lambda file: np.save(file, vectors))
    print(f"{arguments.out}: float32 {list(vectors.shape)}")


if __name__ == "__main__":
    errors.run(main)
