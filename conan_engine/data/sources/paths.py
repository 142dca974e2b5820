"""The files that a source names: one, a folder, a pattern, or a list of these; always in the same order. And how they
are cut into units of work, which depends on their names and sizes alone."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import NamedTuple

from conan_engine.data.sources import hub, saved
from conan_engine.errors import UserError

FORMATS = ("jsonl", "ndjson", "json", "csv", "tsv", "txt")
PACKED = (".gz", ".zst")
TABLES = (".parquet", ".arrow")  # of groups of rows
LIST = ".list"
ENDINGS = f".jsonl, .csv, .tsv, .txt (each also with {' or '.join(PACKED)}), .parquet or .arrow"
RANGED = (".jsonl", ".ndjson", ".txt")  # a line ends where its text does, so one can begin anywhere

UNIT = (8 * 2**20, 2**30)  # bytes of files in a unit, at least (what is there allowing) and at most
MOST_UNITS = 4096  # of a source, where UNIT allows
# The parts of a file without RANGED's ending each read all of it, and keep every so many lines; more of them would
# mostly read.
MOST_STRIPES = 16


class Piece(NamedTuple):
    """A file, or part `part` of `parts` of it (see files.py); `bytes` is about how much of the file that is."""

    path: Path
    bytes: int = 0
    part: int = 0
    parts: int = 1


def unpacked(path: Path) -> str:
    """The ending that says what a file holds, without a dot: "jsonl" of "a.jsonl.zst"."""
    name = Path(path).name.lower()
    return next((name.removesuffix(ending) for ending in PACKED if name.endswith(ending)), name).rpartition(".")[2]


def cut(source: str | Path) -> list[list[Piece]]:
    """A source's files as units of work, each a list of Pieces: neighbours together up to a size, large files in
    parts."""
    sizes = [(path, os.stat(path).st_size) for path in of(source)]
    most = min(max(sum(size for _, size in sizes) // MOST_UNITS, UNIT[0]), UNIT[1])
    units, filled = [[]], 0
    for path, size in sizes:
        parts = max(1, -(-size // most))
        if path.suffix.lower() not in (*RANGED, *TABLES):
            parts = min(parts, MOST_STRIPES)
        for part in range(parts):
            if units[-1] and filled + size // parts > most:
                units.append([])
                filled = 0
            units[-1].append(Piece(path, size // parts, part, parts))
            filled += size // parts
    return units


def of(source: str | Path) -> list[Path]:
    """The files of a source, sorted by name, not as the file system has them.

    source: a file; a folder that `datasets` saved or that says itself which files are which (saved.py); any other
    folder, of which and below which all files count whose ending is one of ENDINGS and whose name begins with neither a
    dot nor an underscore; a pattern of files with * ? [] and ** for any folders; or a file that ends in .list, with one
    of these a line, from the list's own folder on, in the list's order; or what the Hub has, "hf:NAME" (hub.py). Raises
    UserError where there is none.
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
