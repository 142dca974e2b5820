"""Turn the texts of a corpus, of any size, into vectors.

Row i of OUT is the unit vector of record i. Under torchrun, ranks share the
work; K starts that know nothing of each other do one part each (--part 1/K to
K/K, OUT a folder). Stopped or killed, the same command goes on behind what is
finished. Records with "_id" have their ids written too. int8 vectors need the
range of each number: --precision=int8 finds it on a sample and writes it, and
--ranges encodes further documents with the same one.

Examples:
    python -m conan_engine.encode runs/demo docs.jsonl docs.npy --dim 256
    torchrun --nproc_per_node=8 -m conan_engine.encode runs/demo corpus/ vectors
    cat queries.txt | python -m conan_engine.encode runs/demo - queries.npy \\
        --instruction "Find the function that does this"
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from pathlib import Path

import numpy as np

from conan_engine import command
from conan_engine.data.sources import files, paths
from conan_engine.errors import UserError
from conan_engine.evaluation.encoder import Encoder
from conan_engine.vectors.corpus import Corpus
from conan_engine.vectors.making import Making, Share
from conan_engine.vectors.quantize import BITS, stored_as
from conan_engine.vectors.store import Store


def main() -> None:
    parser = command.Parser("encode", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, such as runs/demo, or a checkpoint's")
    parser.add_argument(
        "corpus",
        metavar="CORPUS",
        help=f"{paths.ENDINGS}; a folder or pattern of these; or - for standard input (JSON Lines, or one text a line)",
    )
    parser.add_argument(
        "out", metavar="OUT", help="a .npy file: unit vectors [records, dim]; or a folder of such, with index.json"
    )
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
        help="for int8: the smallest and largest value of each number, .npy float32 [2, dim] (default: those of a "
        "sample)",
    )
    parser.add_argument("--part", default="1/1", metavar="I/K", help="do part I of K")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes of each rank that read and tokenise (default: its cores)"
    )
    arguments = parser.parse_args()
    part, parts = command.part(arguments.part)
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers: got {arguments.workers}; expected 1 or more")
    encoder = Encoder.load(arguments.run)
    dim, share = encoder.checked(arguments.dim), Share.here(encoder.device, arguments.workers, part - 1, parts)
    if not Path(arguments.out).absolute().parent.is_dir():  # found before the work, not after it
        raise UserError(f"{arguments.out}: its folder does not exist; create it, or name another")
    ranges = read_ranges(arguments, dim)
    store = Store(arguments.out, *stored_as(arguments.precision, dim))
    if store.single and parts > 1:
        raise UserError(f"{arguments.out}: parts write into one folder; name a folder in place of a .npy file")
    with tempfile.TemporaryDirectory() as folder:
        given = arguments.corpus == "-"
        source = standard_input(share.world * parts, folder) if given else arguments.corpus
        corpus = Corpus(source, "standard input" if given else source, arguments.instruction)
        given_ranges = ranges is not None and hashlib.blake2b(ranges.tobytes(), digest_size=16).hexdigest()
        about = encoder.about(corpus, dim, arguments.precision, given_ranges)
        if (count := store.complete(about)) is not None:
            print(f"{arguments.out}: complete already, {count:,} vectors")
            return
        making = Making(encoder.reading(corpus), store, share, encoder.windows(dim), arguments.precision, ranges)
        try:
            made = making.run(about)
        except UserError as error:
            raise UserError(str(error).replace(source, corpus.name)) from None
    for line in made:
        print(line)
    if not made and parts > 1 and share.rank == 0:
        print(f"{arguments.out}: part {part} of {parts} is finished; the last one to end completes the folder")


def standard_input(processes: int, folder: str) -> str:
    """Keep what standard input holds as a file, since the corpus is read twice. Returns its path."""
    if processes > 1:
        raise UserError("standard input: several processes cannot share it; write it to a file and name that")
    return str(files.keep_standard_input(Path(folder, "input")))


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
