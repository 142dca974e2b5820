"""Vectors for your own texts: `python -m conan_engine.encode RUN FILE OUT.npy --dim 256`. Row i is record i's text.

Documents in fewer bytes: `--precision=int8` writes OUT.ranges.npy too, which `--ranges` takes for further ones.
Queries of a model that was trained with instructions: `--instruction "Find the function that does this"`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from conan_engine import __version__, atomic, command
from conan_engine.data.encoding import join
from conan_engine.data.sources import files, paths
from conan_engine.errors import UserError
from conan_engine.evaluation.encoder import Encoder
from conan_engine.evaluation.quantize import BITS, quantize, ranges_of


def text_of(record: dict, source: str, instruction: str = "") -> str:
    """What of a record is embedded: its text, its query or its input, behind its own instruction or, where it has none,
    this one."""
    for key in ("text", "query", "input"):
        if key in record:
            return join(record.get("instruction") or instruction, record[key])
    raise UserError(
        f'{source}: holds sentence pairs; encode takes {{"text"}}, {{"query"}} or {{"instruction"}} records'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"conan-engine {__version__}")
    parser.add_argument("run", help="a run folder, such as runs/demo")
    parser.add_argument(
        "file", help=f"{paths.ENDINGS}, a folder or pattern of these; - for standard input, JSON Lines or a text a line"
    )
    parser.add_argument("out", help="a .npy file: [records, dim], unit vectors")
    parser.add_argument("--dim", type=int, help="Matryoshka: only the first DIM numbers (default: all)")
    parser.add_argument(
        "--instruction",
        default="",
        help="what queries were trained behind: each text becomes INSTRUCTION, a new line, the text",
    )
    parser.add_argument(
        "--precision",
        choices=BITS,
        default="float32",
        help="of the vectors, as sentence-transformers' quantize_embeddings gives them (binary: 8 numbers a byte)",
    )
    parser.add_argument(
        "--ranges",
        metavar="FILE",
        help="for int8: the least and the largest of every number, .npy [2, dim] (default: those of these vectors, "
        "written to OUT.ranges.npy)",
    )
    arguments = parser.parse_args()
    encoder = Encoder.load(arguments.run)
    width = encoder.model.config.width
    if arguments.dim is not None and not 1 <= arguments.dim <= width:
        raise UserError(f"--dim is {arguments.dim}; this model has 1 to {width}")
    if not Path(arguments.out).absolute().parent.is_dir():  # before hours of work, not after
        raise UserError(f"{arguments.out}: its folder does not exist; make it, or name another")
    ranges = read_ranges(arguments, arguments.dim or width)
    source, records = (
        ("standard input", files.read_standard_input())
        if arguments.file == "-"
        else (arguments.file, files.read(arguments.file))
    )
    vectors = encoder.encode([text_of(record, source, arguments.instruction) for _, record in records], arguments.dim)
    if arguments.precision == "int8" and ranges is None:
        if len(vectors) < 2:
            raise UserError(
                f"{source}: holds 1 record; --precision=int8 takes its ranges from many: give --ranges of the "
                "documents'"
            )
        ranges, path = ranges_of(vectors), f"{arguments.out.removesuffix('.npy')}.ranges.npy"
        atomic.write(path, lambda file: np.save(file, ranges))
        print(f"{path}: float32 {list(ranges.shape)}, for --ranges")
    stored = quantize(vectors, arguments.precision, ranges)
    atomic.write(arguments.out, lambda file: np.save(file, stored))
    print(f"{arguments.out}: {stored.dtype} {list(stored.shape)}")


def read_ranges(arguments: argparse.Namespace, dim: int) -> np.ndarray | None:
    """float32 [2, dim] of --ranges, None without one."""
    if arguments.ranges is None:
        return None
    if arguments.precision != "int8":
        raise UserError(f"--ranges is for --precision=int8; with {arguments.precision} leave it out")
    try:
        ranges = np.load(arguments.ranges, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{arguments.ranges}: is no .npy file of ranges ({error}); give what --precision=int8 wrote beside "
            "the documents' vectors"
        ) from None
    if not (
        isinstance(ranges, np.ndarray)
        and ranges.dtype == np.float32
        and ranges.shape == (2, dim)
        and np.isfinite(ranges).all()
        and (ranges[0] <= ranges[1]).all()
    ):
        found = f"{ranges.dtype} {list(ranges.shape)}" if isinstance(ranges, np.ndarray) else "an .npz file"
        raise UserError(
            f"{arguments.ranges}: holds {found}, not the least and the largest of {dim} numbers, float32 [2, "
            f"{dim}]; give what --precision=int8 wrote for this run and --dim"
        )
    return ranges


if __name__ == "__main__":
    command.run(main)
