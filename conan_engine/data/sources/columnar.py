"""The rows of Parquet and Arrow files, by pyarrow, some at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conan_engine.errors import UserError

BATCH = 1024  # rows that become Python objects at a time


def rows(path: Path, ending: str, part: int = 0, parts: int = 1, in_order: bool = False) -> Iterator[tuple[str, dict]]:
    """(place, dict) for each row of a file.

    ending: "parquet" or "arrow". The parts of a file take turns at its row groups; in_order, each part has neighbouring
    ones. Raises UserError if pyarrow is not there or cannot read the file.
    """
    name, groups_of = {"parquet": ("a Parquet", _parquet), "arrow": ("an Arrow", _arrow)}[ending]
    try:
        import pyarrow
    except ImportError:
        raise UserError(
            f"{path}: reading {name} file needs pyarrow, which is not installed; pip install pyarrow"
        ) from None
    number = 0
    try:
        groups = _row_groups(path) if in_order and parts > 1 else 0
        for group, (size, batches) in enumerate(groups_of(path)):
            if (group * parts // groups if groups else group % parts) != part:
                number += size
                continue
            for batch in batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not {name} file that pyarrow can read ({' '.join(str(error).split())}); write it again"
        ) from None


Groups = Iterator[tuple[int, Callable[[], Iterator[Any]]]]  # of each row group, its rows, and what gives its batches


def _parquet(path: Path) -> Groups:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield (
                file.metadata.row_group(group).num_rows,
                functools.partial(file.iter_batches, BATCH, row_groups=[group]),
            )


def _row_groups(path):
    import pyarrow.parquet as parquet

    return parquet.read_metadata(path).num_row_groups


def _arrow(path: Path) -> Groups:
    """An Arrow file in its stream form, which datasets writes, or its file form (Feather)."""
    import pyarrow
    from pyarrow import ipc

    with pyarrow.memory_map(str(path)) as mapped:
        if mapped.read(6) == b"ARROW1":
            file = ipc.open_file(mapped)
            batches = map(file.get_batch, range(file.num_record_batches))
        else:
            mapped.seek(0)
            batches = ipc.open_stream(mapped)
        for batch in batches:
            yield (
                batch.num_rows,
                lambda batch=batch: (batch.slice(start, BATCH) for start in range(0, batch.num_rows, BATCH)),
            )
