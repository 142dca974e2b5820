"""The files of a source, always in the same order, and how they are cut into units of work.

The units depend on the names and sizes of the files alone.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import NamedTuple

from conan_engine.data.sources import hub, saved
from conan_engine.errors import UserError

FORMATS = ("jsonl", "ndjson", "json", "csv", "tsv", "txt")
PACKED = (".gz", ".zst")
TABLES = (".parquet", ".arrow")  # files of row groups
LIST = ".list"
ENDINGS = f".jsonl, .csv, .tsv, .txt (each also with {' or '.join(PACKED)}), .parquet or .arrow"
RANGED = (".jsonl", ".ndjson", ".txt")  # one text a line, so a part can begin anywhere

UNIT = (8 * 2**20, 2**30)  # bytes of files in a unit, at least (if there are so many) and at most
MOST_UNITS = 4096  # units of a source, unless UNIT needs more
# Each part of a file that is not RANGED reads all of it and keeps some lines; more parts would mostly read.
MOST_STRIPES = 16


class Piece(NamedTuple):
    """A file, or part `part` of `parts` of it (see files.py); `bytes`: about how much of the file that is. in_order:
    the parts, one after another, have the file's records in its own order.
    """

    path: Path
    bytes: int = 0
    part: int = 0
    parts: int = 1
    in_order: bool = False


def unpacked(path: Path) -> str:
    """The ending that says what a file holds, without a dot: "jsonl" of "a.jsonl.zst"."""
    name = Path(path).name.lower()
    return next((name.removesuffix(ending) for ending in PACKED if name.endswith(ending)), name).rpartition(".")[2]


def cut(source: str | Path, least: int | None = None, in_order: bool = False) -> list[list[Piece]]:
    """Cut a source's files into units of work, each a list of Pieces: small neighbours together, large files in
    parts.

    least: bytes of files in a unit, if there are so many (None: UNIT's). in_order: the units, one after another, have
    the records in their own order; then a file whose parts would take turns is a single one.
    """
    sizes = [(path, os.stat(path).st_size) for path in of(source)]
    most = min(max(sum(size for _, size in sizes) // MOST_UNITS, least or UNIT[0]), UNIT[1])
    units, filled = [[]], 0
    for path, size in sizes:
        parts = max(1, -(-size // most))
        if path.suffix.lower() not in (*RANGED, *TABLES):
            parts = min(parts, MOST_STRIPES)
        if in_order and path.suffix.lower() not in (*RANGED, ".parquet"):
            parts = 1
        for part in range(parts):
            if units[-1] and filled + size // parts > most:
                units.append([])
                filled = 0
            units[-1].append(Piece(path, size // parts, part, parts, in_order))
            filled += size // parts
    return units


def of(source: str | Path) -> list[Path]:
    """The files of a source, sorted by name.

    source: a file; a folder that `datasets` saved or that declares its files (saved.py); any other folder, with all
    files in and below it whose ending is one of ENDINGS and whose name begins with neither a dot nor an underscore; a
    pattern with * ? [] and ** for any folders; a file that ends in .list, with one of these a line, relative to the
    list's own folder, in the list's order; or a dataset of the Hub, "hf:NAME" (hub.py). Raises UserError if there is
    none.
    """
    if str(source).startswith(hub.PREFIX):
        return hub.files(str(source))
    path = Path(source)
    if path.is_file():
        return _listed(path) if path.suffix == LIST else [path]
    if path.is_dir():
        found = saved.files(path) or [
            file for file in path.rglob("*") if _counts(file.relative_to(path)) and file.is_file()
        ]
        missing = f"this folder has no file that ends in {ENDINGS}; name another"
    else:
        found = (
            [file for file in map(Path, glob.glob(str(source), recursive=True)) if file.is_file()]
            if glob.has_magic(str(source))
            else []
        )
        missing = (
            "no file matches this pattern; check it"
            if glob.has_magic(str(source))
            else "no such file, nor the name of a built-in source; check the path"
        )
    if not found:
        raise UserError(f"{source}: {missing}")
    return sorted(found, key=lambda file: file.as_posix())


def _counts(path):
    return not any(part.startswith((".", "_")) for part in path.parts) and (
        unpacked(path) in FORMATS or path.suffix.lower() in TABLES
    )


def _listed(path):
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read as a list of files ({error}); write one path a line, in UTF-8"
        ) from None
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            try:
                found += of(path.parent / line.strip())
            except UserError as error:
                raise UserError(f"{path}: line {number}: {error}") from None
            except RecursionError:
                raise UserError(f"{path}: line {number}: lists that name each other; name files") from None
    if not found:
        raise UserError(f"{path}: names no file; write one path a line")
    return found
