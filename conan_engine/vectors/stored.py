"""The vectors that encode wrote, read part by part."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from conan_engine.errors import UserError
from conan_engine.vectors.quantize import BITS, restore
from conan_engine.vectors.store import IDS, INDEX, RANGES, Store


class Stored:
    """Vectors [N, E], of a .npy file or of a folder with index.json: len, shape, and rows by slice or by sorted
    numbers, float32 or float16; int8 and binary are restored to about unit length.
    """

    def __init__(self, path: str | Path, width: int) -> None:
        """width: of the model, which E cannot exceed. Raises UserError for anything else."""
        self.path = Path(path)
        single = self.path.suffix == ".npy"
        store = Store(self.path, "float32", 1)
        self.about = _index(store.beside(INDEX), single)  # None for a .npy file that encode has not written
        parts = [{"file": self.path.name}] if single else self.about["parts"]
        # paths, since a process cannot hold thousands of files open
        self._parts = [(self.path.parent if single else self.path) / part["file"] for part in parts]
        self._offsets, counts = [], []
        for path, part in zip(self._parts, parts):
            first = _mapped(path, part.get("count"))
            self._offsets.append(first.offset)
            counts.append(len(first))
        self._ends, self._dtype, self._columns = np.cumsum(counts), first.dtype, first.shape[1]
        self._ranges = _mapped(store.beside(RANGES)) if store.beside(RANGES).exists() else None
        packed = first.dtype == np.int8 and self._ranges is None
        self.precision = self.about["precision"] if self.about else "binary" if packed else first.dtype.name
        dim = self.about["dim"] if self.about else min(8 * first.shape[1], width) if packed else first.shape[1]
        self.shape = (int(self._ends[-1]), dim)
        if self.precision == "int8" and self._ranges is None:
            raise UserError(
                f"{self.path}: holds int8 vectors, and {store.beside(RANGES)} is not there; copy the file that encode "
                "wrote beside them"
            )
        self.ids = store.beside(IDS) if store.beside(IDS).exists() else None
        if self.precision not in BITS or not 1 <= dim <= width:
            raise UserError(
                f"{self.path}: holds {first.dtype} vectors of {dim} numbers; expected at most {width}, the width of "
                "this model, as encode writes them"
            )

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            first, last = np.searchsorted(self._ends, start, "right"), np.searchsorted(self._ends, stop, "left")
            found = [self._read(part, start, stop) for part in range(first, last + 1) if start < stop]
        else:
            found = [
                np.load(self._parts[part], mmap_mode="r")[some - self._first(part)]
                for part, some in enumerate(np.split(rows, np.searchsorted(rows, self._ends[:-1])))
                if len(some)
            ]
        joined = found[0] if len(found) == 1 else np.concatenate([np.empty((0, self._columns), self._dtype), *found])
        if self.precision.startswith("float"):
            return joined
        restored = restore(joined, self.precision, self.shape[1], self._ranges)
        return restored / np.float32(self.shape[1] ** 0.5) if self.precision == "binary" else restored

    def _first(self, part):
        """The row in which a part begins."""
        return int(self._ends[part - 1]) if part else 0

    def _read(self, part, start, stop):
        """The rows of a part that are among start to stop."""
        begin = self._first(part)
        start, stop = max(start, begin) - begin, min(stop, int(self._ends[part])) - begin
        offset = self._offsets[part] + start * self._columns * self._dtype.itemsize
        numbers = np.fromfile(self._parts[part], self._dtype, (stop - start) * self._columns, offset=offset)
        return numbers.reshape(-1, self._columns)


def _index(path, single):
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not {"units", "dim", "precision", "weights", "source", "files"} <= found.keys():
            raise ValueError("encode has not written it")
        return found
    except (OSError, ValueError, AttributeError) as error:
        if single and isinstance(error, FileNotFoundError):
            return None
        raise UserError(
            f"{path}: cannot read it ({error}); give a .npy file or a folder that encode has finished"
        ) from None


def _mapped(path, count=None):
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if found.ndim != 2 or not len(found) or count not in (None, len(found)):
            raise ValueError(f"its shape is {list(found.shape)}")
        return found
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot read vectors from it ({error}); encode the corpus again") from None
