"""Where the vectors of a corpus are kept, and how far an unfinished encoding is.

OUT is a .npy file, or a folder with one .npy file for each unit. index.json in the folder, or OUT.index.json beside the
file, is written last: what was encoded and how, the "count" of vectors, and those of each of the "units". While it is
unfinished, a folder beside or in it, ".partial", holds

    about.json          what is encoded, and how; the same command goes on, another one begins again
    units/000012.json   {"count": documents, "named": with an id, "finished": documents whose vectors are written,
                        "tokens": in these}
    ids/000012.jsonl    the ids of a unit's documents
    ranges.npy          of int8
    vectors.npy         of a .npy file
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from conan_engine.atomic import write_json
from conan_engine.errors import UserError
from conan_engine.vectors.blocks import put, until

INDEX, IDS, RANGES = "index.json", "ids.jsonl", "ranges.npy"


class Store:
    """out: OUT; dtype and columns: of a stored vector."""

    def __init__(self, out: str | Path, dtype: str, columns: int) -> None:
        self.out, self.dtype, self.columns = Path(out), np.dtype(dtype), columns
        self.single = self.out.suffix == ".npy"
        self.work = self.out.with_name(f"{self.out.name}.partial") if self.single else self.out / ".partial"
        self._at: dict[int, tuple[Path, int]] = {}  # unit -> (file, byte of its first vector)

    def beside(self, name: str) -> Path:
        """The path of what belongs to the vectors: docs.ids.jsonl beside docs.npy, or ids.jsonl in the folder."""
        return self.out.with_name(f"{self.out.stem}.{name}") if self.single else self.out / name

    def complete(self, about: dict[str, Any]) -> int | None:
        """How many vectors OUT holds, if it is complete; None if it is not, and for a .npy file of something else,
        which is written again. Raises UserError for a folder of anything else.
        """
        if self.single and self.out.is_dir():
            raise UserError(f"{self.out}: cannot write it: a folder has this name; name another")
        if (count := self.completed(about)) is not None or self.single:
            return count
        if (self.out / INDEX).exists():
            raise UserError(
                f"{self.out}: holds the vectors of other files, settings or weights; remove it, or name another"
            )
        if not self.work.exists() and self.out.exists() and next(os.scandir(self.out), None):
            raise UserError(f"{self.out}: exists already, and holds something else; name another folder")
        return None

    def completed(self, about: dict[str, Any]) -> int | None:
        """How many vectors of this encoding OUT holds, complete; else None."""
        found = read_json(self.beside(INDEX))
        if not _matches(found, about) or (self.single and _shape(self.out) != (found["count"], self.columns)):
            return None
        return found["count"]

    def renew(self, about: dict[str, Any]) -> None:
        """Remove what the folder holds, unless it is this encoding, complete or not. Raises UserError if a process
        still works on it.
        """
        found = [read_json(self.out / INDEX), read_json(self.work / "about.json")]
        if self.out.exists() and not any(_matches(one, about) for one in found):
            self._check_idle()
            shutil.rmtree(self.out)

    def begin(self, about: dict[str, Any], alone: bool) -> None:
        """Make the folder of an encoding, or find it there. Raises UserError for one of something else.

        alone: nobody else shares the work, so that an unfinished encoding of something else can make room.
        """
        path = self.work / "about.json"
        about = _as_json(about)
        found = read_json(path)
        if found is not None and found != about:
            if not alone:
                raise UserError(
                    f"{self.work}: holds an unfinished encoding of {found['source']!r} with other files or settings; "
                    "remove it, or name another OUT"
                )
        if found != about:
            self._check_idle()
            shutil.rmtree(self.work, ignore_errors=True)
            if found is not None:
                print(f"{self.out}: the unfinished encoding was of other files or settings; this one begins again")
        for name in ("units", "ids"):
            (self.work / name).mkdir(parents=True, exist_ok=True)
        _write(path, about)

    def _check_idle(self):
        """A process that still works keeps its folder."""
        for lock in self.work.glob("share-*.lock"):
            with self._locked(lock.name, wait=False):
                pass

    def wait(self, about: dict[str, Any]) -> bool:
        """Wait until the first rank has made the folder. Returns False if the others have completed OUT by then."""
        begun = _as_json(about)
        until(lambda: read_json(self.work / "about.json") == begun or self.completed(about) is not None)
        return self.work.exists()

    def ids(self, unit: int) -> Path:
        return self.work / "ids" / f"{unit:06d}.jsonl"

    def state(self, unit: int) -> dict[str, int] | None:
        """How far a unit is; None before its documents are counted."""
        return read_json(self._unit(unit))

    def note(self, unit: int, state: dict[str, int]) -> None:
        _write(self._unit(unit), state)

    def counted(self, unit: int) -> int:
        """The documents of a unit; waits until they are counted."""
        self.until(lambda: self.state(unit) is not None)
        return self.state(unit)["count"]

    def until(self, there: Callable[[], bool]) -> None:
        """Wait for what another process makes in the folder. Raises OSError if the folder is gone."""

        def gone():
            return not (self.work / "about.json").exists()

        until(lambda: there() or gone())
        if gone():
            raise FileNotFoundError(errno.ENOENT, f"{self.work} is gone")

    def report(self, number: int, progress: dict[str, int]) -> None:
        """Note the progress of process `number` of this start, which `reports` reads."""
        _write(self.work / f"progress-{number}.json", progress)

    def reports(self, numbers: Iterable[int]) -> list[dict[str, int]]:
        """The progress of those processes that have noted it."""
        return [found for number in numbers if (found := read_json(self.work / f"progress-{number}.json"))]

    def _unit(self, unit):
        return self.work / "units" / f"{unit:06d}.json"

    def create(self, counts: list[int]) -> None:
        """Make the file of all units' vectors, if it is not there. Raises UserError if it does not fit on the disk."""
        path = self.work / "vectors.npy"
        if not path.exists():
            self._room(sum(counts))
            self._empty(path, sum(counts))
        at = np.load(path, mmap_mode="r").offset
        for unit, count in enumerate(counts):
            self._at[unit] = path, at
            at += count * self.columns * self.dtype.itemsize

    def create_parts(self, counts: dict[int, int]) -> None:
        """Make the file of each of these units that has documents, if it is not there. Raises UserError as `create`."""
        paths = {unit: self.part(unit) for unit, count in counts.items() if count}
        self._room(sum(counts[unit] for unit, path in paths.items() if not path.exists()))
        for unit, path in paths.items():
            if not path.exists():
                self._empty(path, counts[unit])
            self._at[unit] = path, np.load(path, mmap_mode="r").offset

    def part(self, unit: int) -> Path:
        return self.out / f"part-{unit:06d}.npy"

    def put(self, unit: int, first: int, vectors: np.ndarray) -> None:
        """Write vectors [n, columns] of a unit's documents from number `first` on."""
        path, at = self._at[unit]
        put(path, at + first * self.columns * self.dtype.itemsize, vectors)

    def _room(self, count):
        need, free = count * self.columns * self.dtype.itemsize, shutil.disk_usage(self.work).free
        if need > free:
            raise UserError(
                f"{self.out}: {count:,} vectors need {need / 1e9:,.1f} GB, and its disk has {free / 1e9:,.1f} GB free; "
                "make room, or use --dim or --precision"
            )

    def _empty(self, path, count):
        partial = f"{path}.{os.getpid()}"
        np.lib.format.open_memmap(partial, "w+", self.dtype, (count, self.columns))
        os.replace(partial, path)

    def finish(self, states: list[dict[str, int]], about: dict[str, Any]) -> list[str]:
        """Complete OUT, once all units are finished. Returns a line about each file; none if another process has
        completed it.
        """
        if not self.work.exists():
            return []
        with self._locked("finish.lock", wait=True):
            if not (self.work / "about.json").exists():
                return []
            said, beside = [], {}
            count, named = (sum(state[key] for state in states) for key in ("count", "named"))
            ids, ranges = self.beside(IDS), self.beside(RANGES)
            ids.unlink(missing_ok=True)  # of another encoding
            if named == count:
                self._join_ids(ids, len(states))
                said.append(f"{ids}: the ids of {count:,} records")
                beside["ids"] = ids.name
            elif named:
                said.append(f"{self.out}: {count - named:,} of {count:,} records have no _id, so no ids are written")
            if (self.work / RANGES).exists():
                os.replace(self.work / RANGES, ranges)
                said.append(f"{ranges}: float32 [2, {self.columns}], for --ranges")
                beside["ranges"] = ranges.name
            index = about | {"count": count} | beside | {"units": [state["count"] for state in states]}
            if self.single:
                self.beside(INDEX).unlink(missing_ok=True)  # of another encoding
                os.replace(self.work / "vectors.npy", self.out)
            else:
                index["parts"] = [
                    {"file": self.part(unit).name, "count": state["count"]}
                    for unit, state in enumerate(states)
                    if state["count"]
                ]
            write_json(self.beside(INDEX), index)
            shutil.rmtree(self.work, ignore_errors=True)
            return [*said, f"{self.out}: {self.dtype} [{count}, {self.columns}]"]

    def _join_ids(self, path, units):
        partial = Path(f"{path}.partial")
        with open(partial, "wb") as whole:
            for unit in range(units):
                if self.ids(unit).exists():
                    with open(self.ids(unit), "rb") as part:
                        shutil.copyfileobj(part, whole, 1 << 20)
        partial.replace(path)

    def working(self, number: int, of: int) -> contextlib.AbstractContextManager[None]:
        """The time in which process `number` works. Raises UserError if another process does the same."""
        return self._locked(f"share-{number}-of-{of}.lock", wait=False)

    @contextlib.contextmanager
    def _locked(self, name: str, wait: bool) -> Iterator[None]:
        with open(self.work / name, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise UserError(
                    f"{self.out}: another process encodes into it; wait until it ends, or name another OUT"
                ) from None
            except OSError:  # not every file system has locks
                pass
            yield

    def give_up(self) -> None:
        """Remove what an encoding that failed before its first vector has made."""
        shutil.rmtree(self.work, ignore_errors=True)
        if not self.single:
            with contextlib.suppress(OSError):
                for path in self.out.glob("part-*.npy"):
                    path.unlink()
                self.out.rmdir()


def _shape(path):
    """Of the array in a .npy file; None if there is none."""
    try:
        return np.load(path, mmap_mode="r").shape
    except (OSError, ValueError, AttributeError):
        return None


def _matches(found, about):
    """Whether an index.json or about.json that was read is of this encoding."""
    return found is not None and {key: found.get(key) for key in about} == _as_json(about)


def _as_json(content):
    """What a JSON file of it holds."""
    return json.loads(json.dumps(content))


def read_json(path: Path) -> Any:
    """What a JSON file holds; None if it is not there, or was cut off by a power failure."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _write(path, content):
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(path)
