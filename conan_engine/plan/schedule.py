"""What a rank does in a step, in order: what it computes, sends and waits for.

It follows train.py, parallel/sharded_adamw.py and parallel/tensor_parallel.py; collectives of less than SMALL bytes are
left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from conan_engine.model.lm_head import CHUNK_LOGITS

if TYPE_CHECKING:
    from conan_engine.plan.layout import Layout
    from conan_engine.plan.loads import Load
    from conan_engine.plan.memory import Form
    from conan_engine.plan.timing import Times

SMALL = 4096


class Compute(NamedTuple):
    """The device computes for so many seconds."""

    seconds: float


class Send(NamedTuple):
    """A collective starts: "all-gather", "reduce-scatter" or "all-reduce" of so many bytes, those of all ranks' parts
    together, in the group "data" or "tensor". With a bucket's number, a Wait says where it must be complete; without
    one, everything waits for it.
    """

    kind: str
    group: str
    size: int
    bucket: int | None = None


class Wait(NamedTuple):
    """The device waits until the last Send of a bucket is complete."""

    bucket: int


def step(layout: Layout, load: Load, form: Form, times: Times) -> list[Compute | Send | Wait]:
    """The events of one step of a rank, from the first forward pass to the start of the new weights' exchange."""
    done = [*_passes(layout, load, form, times), *_update(layout, form, times)]
    many = {"data": form.data > 1, "tensor": form.tensor > 1}
    return [event for event in done if not isinstance(event, Send) or (many[event.group] and event.size >= SMALL)]


def _passes(layout, load, form, times):
    whole = _Pass(layout, load, form, times)
    if load.learnt:
        for part in range(load.parts):
            yield from whole.forward(waits=part == 0)
            yield from whole.head()
            yield from whole.backward(sends=part == load.parts - 1)
        return
    for part in range(load.parts):  # gradient caching: all vectors come first, and the last part's graph is kept
        yield from whole.forward(waits=part == 0)
    vectors = 4 * layout.shape.width * load.documents * form.data
    yield Send("all-gather", "data", vectors)
    yield Send("all-gather", "data", 8 * load.documents * form.data)  # their groups
    yield Compute(times.loss)
    yield Send("reduce-scatter", "data", vectors)
    yield from whole.backward(sends=load.parts == 1)
    for part in range(1, load.parts):
        yield from whole.forward(waits=False)
        yield from whole.backward(sends=part == load.parts - 1)


def _update(layout, form, times):
    for bucket in reversed(range(len(layout.buckets))):
        yield Wait(bucket)
    yield Compute(times.optimizer)
    for bucket, size in enumerate(layout.buckets):
        yield Send("all-gather", "data", _filled(size, form.data) * _of_weight(form), bucket)


class _Pass:
    """A pass over one part of a step's tokens."""

    def __init__(self, layout, load, form, times):
        self.layout, self.load, self.form, self.times = layout, load, form, times
        self.tokens = _filled(round(load.tokens / load.parts), form.tensor)
        self.halves = range(2 * layout.shape.layers)

    def wait(self, half: int, waits: bool) -> Iterator:
        return (Wait(bucket) for bucket, halves in enumerate(self.layout.halves) if waits and half in halves)

    def between(self, kind: str, size: int | None = None) -> Send:
        """All tokens' vectors between the ranks that share a model."""
        return Send(kind, "tensor", self.tokens * self.layout.shape.width * (size or self.form.size))

    def forward(self, waits: bool) -> Iterator:
        yield from self.wait(-1, waits)
        yield Compute(self.times.table)
        yield self.between("reduce-scatter", _of_weight(self.form))
        for half in self.halves:
            yield self.between("all-gather")
            yield from self.wait(half, waits)
            yield Compute(self.times.block / 2)
            yield self.between("reduce-scatter")
        if not self.load.learnt:
            yield Send("all-reduce", "tensor", 4 * self.layout.shape.width * round(self.load.texts / self.load.parts))

    def head(self) -> Iterator:
        yield self.between("all-gather")
        rows = round(self.load.learnt / self.load.parts)
        chunk = max(1, CHUNK_LOGITS[self.form.device] // self.layout.rows)
        for first in range(0, rows, chunk):
            n = min(chunk, rows - first)
            yield Send("all-reduce", "tensor", 4 * n)  # the largest logit
            yield Send("all-reduce", "tensor", 8 * n)  # the sum of the exponentials, and the target's logit
        yield Compute(self.times.loss)

    def backward(self, sends: bool) -> Iterator:
        unsent = list(range(len(self.layout.buckets))) if sends else []
        if self.load.learnt:
            yield self.between("reduce-scatter")
        for half in reversed(self.halves):
            yield self.between("all-gather")
            if self.form.recompute and half % 2:  # the whole block, up to the last that the backward pass needs
                again = Compute(self.times.block / 2)
                yield from (self.between("all-gather"), again, self.between("reduce-scatter"))
                yield from (self.between("all-gather"), again)
            yield Compute(self.times.block_backward / 2)
            while unsent and min(self.layout.halves[unsent[-1]]) >= half:
                yield from self.send(unsent.pop())
            yield self.between("reduce-scatter")
        yield self.between("all-gather", _of_weight(self.form))
        yield Compute(self.times.table_backward)
        while unsent:
            yield from self.send(unsent.pop())

    def send(self, bucket: int) -> Iterator:
        size = 4 * _filled(self.layout.buckets[bucket], self.form.data)
        if not self.layout.cut[bucket]:
            yield Send("all-reduce", "tensor", size)
        yield Send("reduce-scatter", "data", size, bucket)


def _of_weight(form):
    """Bytes of a weight that computes."""
    return 2 if form.bfloat16 and form.device == "cuda" else 4


def _filled(count, ranks):
    """The next multiple of `ranks`."""
    return -(-count // ranks) * ranks
