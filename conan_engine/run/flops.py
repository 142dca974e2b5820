"""The FLOP of a step, and their share of what the device can do."""

from __future__ import annotations

import re
from typing import Any

import torch

# Peak of dense bfloat16 products in TFLOP/s, by the vendor; keyed by a word of the device's name, first match.
PEAKS = {
    "B200": 2250, "B100": 1750, "H100 PCIe": 756, "H100 NVL": 835, "H20": 148, "H200": 989, "H100": 989, "H800": 989,
    "GH200": 989, "A100": 312, "A800": 312, "A30": 165, "A40": 150, "A10G": 70, "A10": 125, "L40S": 362, "L40": 181,
    "L4": 121, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def peak(device: torch.device) -> int | None:
    """The peak of a torch.device in TFLOP/s, or None if it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


class Work:
    """The FLOP of a stage's steps.

    Per token and weight of the blocks: 2 forward, 2 for the gradient of the input, and 2 for the weight's gradient if
    it is trained. Per learned token and weight of the LM head: 6. Per pair of tokens that attend to each other: 12 D in
    each head of each layer. What is computed twice (gradient caching, recompute) counts once.
    """

    def __init__(self, model: Any, mesh: Any) -> None:
        config, shared = model.config, model.tensor.group.world
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
        self.of_token = shared * sum((6 if p.requires_grad else 4) * p.numel() for p in matrices)
        self.of_learnt = 6 * shared * model.embedding.numel()
        self.of_pair = 12 * config.head * config.heads * config.layers
        self.devices, self.peak = mesh.world, peak(mesh.device) if model.in_bfloat16() else None

    def flop(self, sizes: dict[str, Any]) -> int:
        """The FLOP of a step. sizes: what stages.sizes counted."""
        return self.of_token * sizes["tokens"] + self.of_learnt * sizes["learnt"] + self.of_pair * sizes["pairs"]

    def rate(self, sizes: dict[str, Any], seconds: float) -> dict[str, float]:
        """{"tflops": TFLOP/s of a device, "mfu": their share of its peak}; {} if the peak is not known."""
        if not self.peak:
            return {}
        tflops = self.flop(sizes) / seconds / self.devices / 1e12
        return {"tflops": tflops, "mfu": tflops / self.peak}
