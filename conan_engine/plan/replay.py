"""How long a schedule takes on links of a given speed, and how much of what is sent hides behind what is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from conan_engine.plan.schedule import Compute, Send, Wait

if TYPE_CHECKING:
    from conan_engine.plan.memory import Form

REACHED = 0.8  # of a link's rate, by large collectives; assumed
STARTED = 15e-6  # seconds that a collective takes at least; assumed
WITHIN, BETWEEN = 2e-6, 6e-6  # seconds a hop of a ring, within a machine and between two; assumed


class Links(NamedTuple):
    """GB/s each way of a GPU: to the others of its machine, and to other machines; and the GPUs of a machine."""

    within: float
    between: float
    machine: int


class Time(NamedTuple):
    """Seconds of a step; of it, those in which the device computes, and those in which it waits for what the data
    ranks and the tensor ranks send; seconds that the data ranks send; and bytes that a device sends, by group.
    """

    step: float
    computes: float
    waits_data: float
    waits_tensor: float
    sends_data: float
    sent: dict[str, float]


def of(events: list[Compute | Send | Wait], form: Form, links: Links) -> Time:
    """The Time of a step among equal steps: the second of two, since each begins while the weights are on their way."""
    queue = _Queue(form, links)
    for _ in range(2):
        queue.begin()
        for event in events:
            queue.add(event)
    return queue.time()


class _Queue:
    """A device that computes, and its data group's collectives, one after another beside it."""

    def __init__(self, form, links):
        self.form, self.links = form, links
        self.now = self.free = 0.0
        self.pending: dict[int, float] = {}
        self.begin()

    def begin(self):
        self.began, self.computes, self.sends_data = self.now, 0.0, 0.0
        self.waits, self.sent = {"data": 0.0, "tensor": 0.0}, {"data": 0.0, "tensor": 0.0}

    def add(self, event):
        if isinstance(event, Compute):
            self.now, self.computes = self.now + event.seconds, self.computes + event.seconds
        elif isinstance(event, Wait):
            self.until("data", self.pending.pop(event.bucket, 0.0))
        else:
            seconds, sent = seconds_of(event, self.form, self.links)
            self.sent[event.group] += sent
            if event.group == "tensor":
                self.until("tensor", self.now + seconds)
                return
            self.free = max(self.free, self.now) + seconds
            self.sends_data += seconds
            if event.bucket is None:
                self.until("data", self.free)
            else:
                self.pending[event.bucket] = self.free

    def until(self, group, then):
        if then > self.now:
            self.waits[group] += then - self.now
            self.now = then

    def time(self):
        step = self.now - self.began
        return Time(step, self.computes, self.waits["data"], self.waits["tensor"], self.sends_data, self.sent)


def seconds_of(send: Send, form: Form, links: Links) -> tuple[float, float]:
    """(seconds of a collective, bytes that each of its ranks sends), around a ring.

    The ranks of a machine cross to the next one by all their links together.
    """
    ranks = form.data if send.group == "data" else form.tensor
    near = ranks if send.group == "tensor" else max(1, links.machine // form.tensor)
    near = min(near, links.machine, ranks)
    machines = -(-ranks // near)
    rate = links.within if machines == 1 else min(links.within, links.between * near)
    rounds = 2 if send.kind == "all-reduce" else 1
    sent = rounds * send.size * (ranks - 1) / ranks
    hops = rounds * ((ranks - machines) * WITHIN + (machines if machines > 1 else 0) * BETWEEN)
    return STARTED + hops + sent / (REACHED * 1e9 * rate), sent
