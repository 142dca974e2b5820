"""Choose the precision of matrix products: as set, or whichever the device multiplies faster at the model's shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from conan_engine.parallel import cpu

if TYPE_CHECKING:
    from conan_engine.config import Config


FASTER = 1.05  # less than this ratio is within the noise of the measurement


def choose(config: Config, mesh: Any, before: str | None = None) -> tuple[str, str]:
    """Choose: ("bfloat16" or "float32", a line that says why, or "" where it was set). A collective.

    before: the precision in the run's checkpoint, which it keeps.
    """
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
