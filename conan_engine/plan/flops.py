"""The FLOP of a step, and their share of what the device can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conan_engine.model.transformer import Transformer
    from conan_engine.plan.devices import Device


class Work:
    """The FLOP of a stage's steps.

    Per token and weight of the blocks: 2 forward, 2 for the gradient of the input, and 2 for the weight's gradient if
    it is trained. Per learned token and weight of the LM head: 6. Per pair of tokens that attend to each other: 12 D in
    each head of each layer. What is computed twice (gradient caching, recompute) counts once.
    """

    def __init__(self, model: Transformer, devices: int = 1, device: Device | None = None) -> None:
        """devices: how many share a step. device: what each is, if that is known."""
        config, shared = model.config, model.tensor.group.world
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
        self.of_token = shared * sum((6 if p.requires_grad else 4) * p.numel() for p in matrices)
        self.of_learnt = 6 * shared * model.embedding.numel()
        self.of_pair = 12 * config.head * config.heads * config.layers
        self.devices, self.peak = devices, device.tflops if device and model.in_bfloat16() else None

    def flop(self, sizes: dict[str, Any]) -> int:
        """The FLOP of a step. sizes: what stages.packed.sizes counted."""
        return self.of_token * sizes["tokens"] + self.of_learnt * sizes["learnt"] + self.of_pair * sizes["pairs"]

    def rate(self, sizes: dict[str, Any], seconds: float) -> dict[str, float]:
        """{"tflops": TFLOP/s of a device, "mfu": their share of its peak}; {} if the peak is not known."""
        if not self.peak:
            return {}
        tflops = self.flop(sizes) / seconds / self.devices / 1e12
        return {"tflops": tflops, "mfu": tflops / self.peak}
