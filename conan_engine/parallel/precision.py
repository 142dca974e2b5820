"""In which precision a run's matrix products are: as set, or what its device multiplies faster at the model's own
shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from conan_engine.parallel import cpu

if TYPE_CHECKING:
    from conan_engine.config import Config


FASTER = 1.05  # times as fast: less is within what a measurement varies by


def choose(config: Config, mesh: Any, before: str | None = None) -> tuple[str, str]:
    """("bfloat16" or "float32", why: a line, or "" where it was set). before: what it was in the run's checkpoint,
    which it stays. Collective."""
    if config.precision != "auto":
        return config.precision, ""
    if before:
        return before, f"products in {before}, as this run began; --precision sets another"
    if mesh.device.type == "cuda":
        return "bfloat16", ""
    ratio = mesh.gather_objects(cpu.bfloat16_rate(config.model.width, config.model.ffn) if mesh.rank == 0 else None)[0]
    if ratio is None:
        return "float32", "products in float32: this processor has no instructions for bfloat16"
    chosen = "bfloat16" if ratio > FASTER else "float32"
    return chosen, f"products in {chosen}: bfloat16 runs at {ratio:.2f} times the rate of float32 here"
