"""The memory and the time of a stage on a mesh of ranks, and which meshes are the best."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from conan_engine.plan import loads, memory, replay, schedule, timing
from conan_engine.plan.flops import Work
from conan_engine.plan.layout import Layout
from conan_engine.plan.memory import Form

if TYPE_CHECKING:
    from conan_engine.config import Config
    from conan_engine.plan.devices import Device
    from conan_engine.plan.lengths import Lengths
    from conan_engine.plan.loads import Load
    from conan_engine.plan.replay import Links, Time

USABLE = 0.94  # of a GPU's memory: the rest is CUDA's, NCCL's, and lost between allocations; assumed


class Machines(NamedTuple):
    """GPUs of one kind, so many, and their links."""

    device: Device
    gpus: int
    links: Links


class Cut(NamedTuple):
    """What a rank computes at a time: the stage's chunk and chunk_tokens, of which one is 0."""

    chunk: int = 0
    chunk_tokens: int = 0

    def __str__(self) -> str:
        return f"{self.chunk_tokens}t" if self.chunk_tokens else f"{self.chunk}"


@dataclasses.dataclass
class Planned:
    """A stage on a mesh. bytes: of a device by kind. time: None without Machines."""

    name: str
    steps: int
    cut: Cut
    form: Form
    load: Load
    bytes: dict[str, int]
    work: Work
    time: Time | None = None

    @property
    def memory(self) -> int:
        return sum(self.bytes.values())

    @property
    def flop(self) -> float:
        """Of a step, over all ranks."""
        return self.work.flop(self.load.sizes(self.form.data))

    @property
    def seconds(self) -> float:
        return self.steps * self.time.step

    def mfu(self, machines: Machines) -> float:
        return self.flop / self.time.step / machines.gpus / machines.device.tflops / 1e12

    def fits(self, machines: Machines) -> bool:
        return self.memory <= USABLE * 2**30 * machines.device.memory


class Planner:
    """Plans the stages of a config."""

    def __init__(self, config: Config, vocab_size: int, lengths: Lengths) -> None:
        self.config, self.vocab_size, self.lengths, self.layouts = config, vocab_size, lengths, {}

    def layout(self, name: str, tensor: int) -> Layout:
        if (name, tensor) not in self.layouts:
            self.layouts[name, tensor] = Layout(self.config, name, self.vocab_size, tensor)
        return self.layouts[name, tensor]

    def stage(self, name: str, form: Form, machines: Machines | None = None, cut: Cut | None = None) -> Planned:
        """Plan a stage. cut: in place of the config's."""
        settings = getattr(self.config, name)
        cut = Cut(settings.chunk, settings.chunk_tokens) if cut is None else cut
        config = dataclasses.replace(self.config, **{name: dataclasses.replace(settings, **cut._asdict())})
        layout, load = self.layout(name, form.tensor), loads.of(name, config, form.data, self.lengths)
        held = memory.of(layout, load, form)
        planned = Planned(name, settings.steps, cut, form, load, held, Work(layout.model))
        if machines:
            times = timing.of(layout, load, form, machines.device)
            planned.time = replay.of(schedule.step(layout, load, form, times), form, machines.links)
        return planned

    def fitting(self, machines: Machines) -> list[list[Planned]]:
        """All stages on each mesh on which they fit, each in the largest chunk that fits, the fastest mesh first."""
        found = []
        for form in self._forms(machines):
            stages = [self._fastest(name, form, machines) for name in self.config.stages]
            if all(stages):
                found.append(stages)
        return sorted(found, key=lambda stages: sum(one.seconds for one in stages))

    def _forms(self, machines: Machines) -> Iterator[Form]:
        shape = self.config.model
        shared = (shape.heads, shape.kv_heads, shape.ffn, self.vocab_size, machines.gpus)
        for tensor in (1, 2, 4, 8):
            if tensor <= machines.links.machine and not any(n % tensor for n in shared):
                for recompute in (False, True):
                    yield Form("cuda", True, recompute, machines.gpus // tensor, tensor)

    def uneven(self, name: str, ranks: int) -> str:
        """Which of a stage's batches so many ranks cannot split evenly, as a line, or ""."""
        settings = getattr(self.config, name)
        keys = [] if name == "weak" and settings.batch_tokens else ["batch"]
        keys += ["sts_batch"] if name == "supervised" and settings.sts else []
        keys += ["texts_batch"] if name == "weak" and settings.texts else []
        found = [f"{name}.{key} = {getattr(settings, key)}" for key in keys if getattr(settings, key) % ranks]
        return f"{ranks} ranks cannot split {' and '.join(found)} evenly" if found else ""

    def _fastest(self, name, form, machines):
        """The stage in the largest chunk that fits; None if its batch does not divide, or nothing fits."""
        if self.uneven(name, form.data):
            return None
        settings = getattr(self.config, name)
        whole = self.stage(name, form, cut=Cut())
        if settings.chunk_tokens:
            key, most = "chunk_tokens", whole.load.at_once
        else:
            rows = name in ("pretrain", "sft")
            key, most = "chunk", settings.batch // form.data if rows else whole.load.texts
        # a larger chunk has fewer kernels to start and fewer passes over the gradients
        for cut in (Cut(), *(Cut(**{key: 2**k}) for k in reversed(range(max(0, round(most) - 1).bit_length())))):
            if self.stage(name, form, cut=cut).fits(machines):
                return self.stage(name, form, machines, cut)
        return None
