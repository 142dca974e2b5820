"""Turn texts into vectors.

Row i of OUT is the unit vector of record i. int8 vectors need the range of each
number: --precision=int8 writes it to OUT.ranges.npy, and --ranges encodes
further documents with the same one.

Examples:
    python -m conan_engine.encode runs/demo docs.jsonl docs.npy --dim 256
    python -m conan_engine.encode runs/demo docs.jsonl docs.npy --precision int8
    cat queries.txt | python -m conan_engine.encode runs/demo - queries.npy \\
        --instruction "Find the function that does this"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from conan_engine import atomic, command
from conan_engine.data.encoding import join
from conan_engine.data.sources import files, paths
from conan_engine.errors import UserError
from conan_engine.evaluation.encoder import Encoder
from conan_engine.evaluation.quantize import BITS, quantize, ranges_of


def text_of(record: dict, source: str, instruction: str = "") -> str:
    """The text of a record that is embedded: its text, query or input, after its own instruction or else `instruction`.
    Raises UserError for sentence pairs.
    """
    for key in ("text", "query", "input"):
        if key in record:
            return join(record.get("instruction") or instruction, record[key])
    raise UserError(
        f'{source}: holds sentence pairs; encode takes {{"text"}}, {{"query"}} or {{"instruction"}} records'
    )


def main() -> None:
    parser = command.Parser("encode", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, such as runs/demo, or a checkpoint's")
    parser.add_argument(
        "file",
        metavar="FILE",
        help=f"{paths.ENDINGS}; a folder or pattern of these; or - for standard input (JSON Lines, or one text a line)",
    )
    parser.add_argument("out", metavar="OUT", help="a .npy file: unit vectors [records, dim]")
    parser.add_argument("--dim", type=int, metavar="N", help="keep the first N numbers of each vector (default: all)")
    parser.add_argument(
        "--instruction",
        default="",
        metavar="TEXT",
        help="put TEXT and a new line before each text that has no instruction of its own",
    )
    parser.add_argument(
        "--precision",
        choices=BITS,
        default="float32",
        help="of the vectors, as sentence-transformers' quantize_embeddings makes them; binary packs 8 numbers a byte",
    )
    parser.add_argument(
        "--ranges",
        metavar="FILE",
        help="for int8: the smallest and largest value of each number, .npy float32 [2, dim] (default: those of these "
        "vectors)",
    )
    arguments = parser.parse_args()
    encoder = Encoder.load(arguments.run)
    width = encoder.model.config.width
    if arguments.dim is not None and not 1 <= arguments.dim <= width:
        raise UserError(f"--dim is {arguments.dim}; expected 1 to {width}, the width of this model")
    if not Path(arguments.out).absolute().parent.is_dir():  # found before the work, not after it
        raise UserError(f"{arguments.out}: its folder does not exist; create it, or name another")
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
                f"{source}: holds {len(vectors)} record; --precision=int8 needs at least 2 to find its ranges: give "
                "--ranges"
            )
        ranges, path = ranges_of(vectors), f"{arguments.out.removesuffix('.npy')}.ranges.npy"
        atomic.write(path, lambda file: np.save(file, ranges))
        print(f"{path}: float32 {list(ranges.shape)}, for --ranges")
    stored = quantize(vectors, arguments.precision, ranges)
    atomic.write(arguments.out, lambda file: np.save(file, stored))
    print(f"{arguments.out}: {stored.dtype} {list(stored.shape)}")


def read_ranges(arguments: argparse.Namespace, dim: int) -> np.ndarray | None:
    """The ranges of --ranges, float32 [2, dim], or None without one. Raises UserError for a file that holds something
    else.
    """
    if arguments.ranges is None:
        return None
    if arguments.precision != "int8":
        raise UserError(f"--ranges is for --precision=int8, and --precision is {arguments.precision}; leave one out")
    try:
        ranges = np.load(arguments.ranges, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{arguments.ranges}: cannot read it as a .npy file of ranges ({error}); give the .ranges.npy that "
            "--precision=int8 wrote"
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
            f"{arguments.ranges}: holds {found}; expected float32 [2, {dim}], the smallest and largest value of each "
            "number: give the .ranges.npy that --precision=int8 wrote for this run and --dim"
        )
    return ranges


if __name__ == "__main__":
    command.run(main)
