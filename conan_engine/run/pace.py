"""The speed of each step: seconds, how much of them was waiting, tokens/s, and the share of the device's peak."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from conan_engine.parallel.mesh import Mesh, waiting
from conan_engine.plan import devices
from conan_engine.plan.flops import Work

if TYPE_CHECKING:
    from conan_engine.model.transformer import Transformer


class Pace:
    """Measures one step after another: `begin`, `drawn` when its batch is there, `end`."""

    def __init__(self, model: Transformer, mesh: Mesh) -> None:
        self.work, self.several = Work(model, mesh.world, devices.of(mesh.device)), mesh.world > 1

    def begin(self) -> None:
        self.began = time.perf_counter()
        waiting.begin()

    def drawn(self) -> None:
        self.waited = time.perf_counter() - self.began

    def end(self, sizes: dict[str, Any]) -> dict[str, float]:
        """The numbers of a step for metrics.jsonl. sizes: what stages.packed.sizes counted.

        sent_ms, with several ranks: how long this rank's device waited for what others send.
        """
        seconds = time.perf_counter() - self.began
        row = {"seconds": seconds, "waited": self.waited, "tokens_per_s": sizes["tokens"] / seconds}
        return row | self.work.rate(sizes, seconds) | ({"sent_ms": waiting.end()} if self.several else {})
