"""Work that all ranks share out block by block over files in one folder, so that a stopped run goes on behind what it
has finished. None of it is a collective, which would give up on a rank that takes its time: ranks look at the folder.
"""

import os
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm


class Blocks:
    """folder: of the files; source: what the bars call it; mesh: the ranks. Which blocks are done stands in its folder
    "done", a file each."""

    def __init__(self, folder, source, mesh):
        self.done, self.source, self.mesh = Path(folder, "done"), source, mesh

    def begin(self):
        self.done.mkdir(parents=True, exist_ok=True)

    def todo(self, what, count, group, doing):
        """This rank's blocks, of `count`, that are not done, as it begins: the ranks of one copy of a model have to
        agree. group: the ranks that share them out."""
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

    def finished(self, what, number):
        (self.done / f"{what}-{number:06d}").touch()

    def wait(self, what, count):
        """Until all ranks' blocks are done."""
        until(lambda: sum(path.name.startswith(f"{what}-") for path in self.done.iterdir()) >= count)

    def made_once(self, path, make):
        """Until the file is there, which rank 0 makes beside its place: make(path)."""
        if self.mesh.rank == 0 and not path.exists():
            make(f"{path}.partial")
            os.replace(f"{path}.partial", path)
        until(path.exists)


def until(there):
    while not there():
        time.sleep(0.1)


def put(path, at, array):
    """Bytes at a place of a file, on the disk before this returns."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        view = memoryview(np.ascontiguousarray(array)).cast("B")
        while view:
            written = os.pwrite(handle, view, at)
            view, at = view[written:], at + written
        os.fsync(handle)
    finally:
        os.close(handle)
