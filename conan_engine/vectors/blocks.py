"""Share out work over all ranks, block by block, with its results in one folder. A stopped run continues behind the
finished blocks.

Nothing here is a collective, which would give up on a slow rank: ranks look at the folder.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm


class Blocks:
    """folder: of the files; source: its name in progress bars; mesh: the ranks. Finished blocks are noted in the
    folder "done", one file each.
    """

    def __init__(self, folder: str | Path, source: str, mesh: Any) -> None:
        self.done, self.source, self.mesh = Path(folder, "done"), source, mesh

    def begin(self) -> None:
        self.done.mkdir(parents=True, exist_ok=True)

    def todo(self, what: str, count: int, group: Any, doing: str) -> Iterable[int]:
        """This rank's blocks, of `count`, that are not finished when it begins.

        The list is made once, since the ranks of one copy of a model have to agree. group: the ranks that share out the
        blocks.
        """
        done = {path.name for path in self.done.iterdir()}
        mine = [number for number in range(group.rank, count, group.world) if f"{what}-{number:06d}" not in done]
        return tqdm(
            mine,
            desc=f"{doing} of {self.source}",
            unit="block",
            leave=False,
            mininterval=1,
            disable=self.mesh.rank != 0 or len(mine) < 2,
        )

    def finished(self, what: str, number: int) -> None:
        (self.done / f"{what}-{number:06d}").touch()

    def wait(self, what: str, count: int) -> None:
        """Wait until the blocks of all ranks are finished."""
        until(lambda: sum(path.name.startswith(f"{what}-") for path in self.done.iterdir()) >= count)

    def made_once(self, path: Path, make: Callable[[str], None]) -> None:
        """Wait until the file exists. Rank 0 makes it by make(path) beside its place."""
        if self.mesh.rank == 0 and not path.exists():
            make(f"{path}.partial")
            os.replace(f"{path}.partial", path)
        until(path.exists)


def until(there: Callable[[], bool]) -> None:
    while not there():
        time.sleep(0.1)


def put(path: str | Path, at: int, array: np.ndarray) -> None:
    """Write bytes at a place of a file, to disk before this returns."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        view = np.ascontiguousarray(array).data.cast("B")
        while view:
            written = os.pwrite(handle, view, at)
            view, at = view[written:], at + written
        os.fsync(handle)
    finally:
        os.close(handle)
