"""The tensors of a checkpoint as its ranks wrote them, each its part in its own file, read by any other mesh of
ranks.

The file of rank r holds, for each parameter, the numbers in r's share of the optimizer: consecutive numbers of the
slice that r's place in its tensor group has. The header holds `tensor`, that place and the size of the group, and
`starts`, the position of each tensor's first number in the slice. A file without them (from before tensor parallelism)
holds whole tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    from torch import Tensor


def write(path: Path, tensors: dict[str, Tensor], starts: dict[str, int], group: Any) -> None:
    """Write a file. tensors: {name: float32 [n]} in host memory; starts: {name: int}; group: the tensor ranks."""
    save_file(tensors, path, {"tensor": json.dumps([group.rank, group.world]), "starts": json.dumps(starts)})


class Pieces:
    """All files of one kind in a checkpoint. Nothing is read before it is needed."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._of = {}  # name -> [(file, first number, place, tensor ranks)]
        for path in paths:
            file = safe_open(path, "pt")  # mapped: copying a few numbers reads only those
            about = file.metadata() or {}
            place, starts = json.loads(about.get("tensor", "[0, 1]")), json.loads(about.get("starts", "{}"))
            for name in file.keys():
                self._of.setdefault(name, []).append((file, starts.get(name, 0), *place))

    def read_into(self, out: Tensor, name: str, p: Tensor, group: Any, start: int = 0) -> None:
        """Fill `out` [n], on any device, with the numbers of parameter `p` from its number `start` on.

        name: the parameter's; group: the tensor ranks. Raises KeyError if the files lack some of the numbers.
        """
        split, missing = getattr(p, "split_by", None), len(out)
        if split:
            shape = [size * (group.world if dim == split.dim else 1) for dim, size in enumerate(p.shape)]
            wanted = _clipped(_runs(shape, split, group.rank, group.world), start, len(out))
        for file, first, rank, world in self._of.get(name, ()):
            here = file.get_tensor(name).flatten()
            if not split or (rank, world) == (group.rank, group.world):
                low, high = max(start, first), min(start + len(out), first + len(here))
                pairs = [(low - start, low - first, high - low)] if low < high else []
            else:
                pairs = _common(wanted, _clipped(_runs(shape, split, rank, world), first, len(here)))
            for to, of, count in pairs:
                out[to : to + count] = here[of : of + count]
                missing -= count
        if missing:
            raise KeyError(name)


def _runs(shape, split, rank, world):
    """The slice that `split` gives a rank, as runs of consecutive numbers of the whole: int64 [runs] each of (place
    in the slice, place in the whole, length).
    """
    inner, outer = int(np.prod(shape[split.dim + 1 :])), int(np.prod(shape[: split.dim]))
    sections = np.tile(np.array(split.sections) * inner, outer)
    each = sections // world
    return np.stack((np.cumsum(each) - each, np.cumsum(sections) - sections + rank * each, each))


def _clipped(runs, first, count):
    """The part of the runs within the `count` numbers of the slice from `first` on, from which places then count."""
    place, whole, length = runs
    low, high = np.maximum(place, first), np.minimum(place + length, first + count)
    kept = low < high
    return np.stack((low - first, whole + low - place, high - low))[:, kept]


def _common(one, other):
    """(place in one slice, place in the other, length) of the numbers that both lists of runs hold; both are sorted."""
    i, j, found = 0, 0, []
    ones, others = one.T.tolist(), other.T.tolist()
    while i < len(ones) and j < len(others):
        (a, x, n), (b, y, m) = ones[i], others[j]
        low, high = max(x, y), min(x + n, y + m)
        if low < high:
            found.append((a + low - x, b + low - y, high - low))
        i, j = (i + 1, j) if x + n < y + m else (i, j + 1)
    return found
