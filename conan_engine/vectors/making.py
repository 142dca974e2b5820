"""Encode a corpus: count it, then embed it window by window. Any number of processes share the units of its files.

What a vector is depends on its window alone, so the file is the same for any number of processes and starts.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from conan_engine import atomic
from conan_engine.data.sources import files
from conan_engine.data.sources.processes import Pool
from conan_engine.errors import UserError
from conan_engine.vectors import store as kept
from conan_engine.vectors import windows
from conan_engine.vectors.quantize import quantize, ranges_of

if TYPE_CHECKING:
    import torch

    from conan_engine.vectors.corpus import Corpus
    from conan_engine.vectors.store import Store
    from conan_engine.vectors.windows import Reading, Window


SAMPLE = 2**14  # documents whose vectors give int8 its ranges


class Share(NamedTuple):
    """What this process does: of `parts` starts, which know nothing of each other, number `part`, whose `world` ranks
    share it out; `processes` beside this one read.
    """

    rank: int = 0
    world: int = 1
    part: int = 0
    parts: int = 1
    processes: int = 0

    @classmethod
    def here(cls, device: torch.device, workers: int | None = None, part: int = 0, parts: int = 1) -> Share:
        """That of this rank, as torchrun numbers it. workers: processes that read (None: its cores; a CPU that has a
        single core for this rank does both in one process).
        """
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        processes = workers or (cores if cores > 1 else int(device.type == "cuda"))
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), part, parts, processes)

    @property
    def alone(self) -> bool:
        return self.world * self.parts == 1

    @property
    def number(self) -> int:
        """Of this process, among those of all parts."""
        return self.part * self.world + self.rank

    def mine(self, units: int) -> range:
        return range(self.number, units, self.parts * self.world)


class Making:
    """embed(tokens int32 [T], cu_seqlens int64 [B+1]) -> unit vectors float32 [B, E]. ranges: of int8, float32 [2, E];
    None: those of a sample.
    """

    def __init__(
        self,
        reading: Reading,
        store: Store,
        share: Share,
        embed: Callable[[np.ndarray, np.ndarray], np.ndarray],
        precision: str = "float32",
        ranges: np.ndarray | None = None,
    ) -> None:
        self.reading, self.store, self.share, self.embed = reading, store, share, embed
        self.precision, self.ranges = precision, ranges
        self.units = reading.corpus.units()
        self.mine = share.mine(len(self.units))

    def run(self, about: dict[str, Any]) -> list[str]:
        """Do this process's share, from where an earlier start stopped; complete the vectors if it is the last.

        about: what identifies the encoding. Returns a line about each file, if this process completed them.
        Raises UserError for a bad record, a corpus without documents, and a folder that cannot be written.
        """
        store, share = self.store, self.share
        try:
            if share.rank == 0:
                store.begin(about, share.parts == 1)
            if not store.wait(about):
                return []
            with store.working(share.number, share.parts * share.world):
                return self._share(about)
        except OSError as error:
            if store.completed(about) is not None:  # by the others, while this one had nothing to do
                return []
            raise UserError(
                f"{store.out}: cannot write it ({error.strerror}); make room or use another folder, then run again: "
                "what is finished is kept"
            ) from None

    def _share(self, about: dict[str, Any]) -> list[str]:
        store = self.store
        try:
            self._count()
            if self.precision == "int8":
                self.ranges = self._kept_ranges()
            self._encode()
            states = [state for unit in range(len(self.units)) if (state := store.state(unit))]
            if len(states) < len(self.units) or any(state["finished"] < state["count"] for state in states):
                return []
            if not any(state["count"] for state in states):
                raise files.nothing_in(self.reading.corpus.name)
            return store.finish(states, about)
        except UserError:
            states = [store.state(unit) or {} for unit in range(len(self.units))]
            if self.share.alone and not any(state.get("finished") for state in states):
                store.give_up()
            raise

    def _count(self) -> None:
        """Count the documents of this process's units, which also finds what is wrong with them before the work begins;
        then make room for their vectors.
        """
        store, corpus, units = self.store, self.reading.corpus, self.units
        todo = [unit for unit in self.mine if store.state(unit) is None]
        sizes = {unit: sum(piece.bytes for piece in units[unit]) for unit in todo}
        items = [(corpus, units[unit], str(store.ids(unit))) for unit in todo]
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(
                _bar("reading the corpus", sum(sizes.values()), "B", self.share.rank == 0 and len(todo) > 1)
            )
            if self.share.processes and sum(sizes.values()) > windows.SMALL:
                pool = stack.enter_context(Pool(self.share.processes))
                found = pool.unordered(_count, items, lambda: None)
            else:
                found = enumerate(map(_count, items))
            for i, (count, named) in found:
                store.note(todo[i], {"count": count, "named": named, "finished": 0, "tokens": 0})
                bar.update(sizes[todo[i]])
        if store.single:  # a vector's place depends on all units before its own
            counts = [store.counted(unit) for unit in range(len(units))]
            if not sum(counts):
                raise files.nothing_in(corpus.name)
            if self.share.rank == 0:
                store.create(counts)
            store.until((store.work / "vectors.npy").exists)
            store.create(counts)
        else:
            store.create_parts({unit: store.counted(unit) for unit in self.mine})

    def _kept_ranges(self) -> np.ndarray:
        """The ranges, which the first rank keeps beside the vectors."""
        path = self.store.work / kept.RANGES
        if self.share.rank == 0 and not path.exists():
            ranges = self._sampled() if self.ranges is None else self.ranges
            atomic.write(path, lambda file: np.save(file, ranges))
        self.store.until(path.exists)
        return np.load(path)

    def _sampled(self) -> np.ndarray:
        """The ranges of the first documents of the units."""
        each = -(-SAMPLE // len(self.units))
        texts = [
            document.text
            for pieces in self.units
            for document in itertools.islice(self.reading.corpus.documents(pieces), each)
        ]
        if len(texts) < 2:
            raise UserError(
                f"{self.reading.corpus.name}: holds {len(texts)} record; --precision=int8 needs at least 2 to find "
                "its ranges: give --ranges"
            )
        encoded = self.reading.tokenizer.encode_texts(texts, self.reading.max_tokens)
        print(f"the ranges of int8 are those of the vectors of {len(texts):,} documents", flush=True)
        return ranges_of(self.embed(*windows.packed(encoded)))

    def _encode(self) -> None:
        store = self.store
        states = {unit: state for unit in self.mine if (state := store.state(unit))}
        tasks = [
            windows.Task(unit, self.units[unit], state["finished"])
            for unit, state in states.items()
            if state["finished"] < state["count"]
        ]
        if self.share.rank == 0:
            self._say_what_is_finished()
        progress, before = _Progress(store, self.share, states), Future()
        before.set_result(None)
        with (
            progress,
            contextlib.closing(windows.read(self.reading, tasks, self.share.processes)) as found,
            ThreadPoolExecutor(1) as writer,  # while the next window is embedded
        ):
            for window in found:
                vectors = self.embed(window.tokens, window.cu_seqlens)
                before.result()
                before = writer.submit(self._write, window, vectors, states[window.unit])
                progress.add(len(vectors), len(window.tokens))
            before.result()

    def _say_what_is_finished(self):
        share = self.share
        units = itertools.chain.from_iterable(
            share._replace(rank=rank).mine(len(self.units)) for rank in range(share.world)
        )
        states = [state for unit in units if (state := self.store.state(unit))]
        finished, count = (sum(state[key] for state in states) for key in ("finished", "count"))
        if finished:
            print(f"{self.store.out}: going on behind {finished:,} of {count:,} records", flush=True)

    def _write(self, window: Window, vectors: np.ndarray, state: dict[str, int]) -> None:
        self.store.put(window.unit, window.first, quantize(vectors, self.precision, self.ranges))
        state["finished"] = window.first + len(vectors)
        state["tokens"] += len(window.tokens)
        self.store.note(window.unit, state)


class _Progress:
    """A bar over the documents of all ranks of a start, which rank 0 shows. Each rank notes its own in a file."""

    def __init__(self, store, share, states):
        self.store, self.share = store, share
        behind = sum(state["finished"] for state in states.values())
        self.mine = {
            "behind": behind,
            "total": sum(state["count"] for state in states.values()),
            "done": 0,
            "tokens": 0,
        }
        store.report(share.number, self.mine)
        self.began = self.shown = time.perf_counter()
        self.bar = _bar("encoding", self.mine["total"], " texts", share.rank == 0)

    def add(self, texts, tokens):
        self.mine["done"] += texts
        self.mine["tokens"] += tokens
        now = time.perf_counter()
        if now - self.shown < 1:
            return
        self.shown = now
        self.store.report(self.share.number, self.mine)
        if self.share.rank == 0:
            every = self.store.reports(range(self.share.number, self.share.number + self.share.world))
            total = {key: sum(one[key] for one in every) for key in self.mine}
            self.bar.total, self.bar.initial = total["total"], total["behind"]
            self.bar.set_postfix_str(f"{total['tokens'] / (now - self.began):,.0f} tokens/s", refresh=False)
            self.bar.n = total["behind"] + total["done"]
            self.bar.refresh()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()


def _bar(doing, total, unit, shown):
    return tqdm(
        desc=doing, total=total, unit=unit, unit_scale=True, leave=False, delay=1, mininterval=1, disable=not shown
    )


def _count(item: tuple[Corpus, list, str]) -> tuple[int, int]:
    corpus, pieces, ids = item
    return corpus.tally(pieces, ids)
