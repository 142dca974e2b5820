"""Choose the device that a run computes on."""

from __future__ import annotations

import torch

from conan_engine.errors import UserError
from conan_kernels.architecture import architecture


def choose(setting: str = "auto", index: int = 0) -> torch.device:
    """The torch.device for "cuda", "cpu" or "auto" (CUDA where there is a GPU).

    Raises UserError if "cuda" finds no GPU, and for a GPU or a Triton that the kernels do not run on.
    """
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if index >= torch.cuda.device_count():
        raise UserError(
            f"device: this process needs CUDA GPU {index}, and torch {torch.__version__} sees "
            f"{torch.cuda.device_count()}; use --device=cpu, or fewer processes"
        )
    device = torch.device("cuda", index)
    try:
        architecture(device)
    except RuntimeError as error:
        raise UserError(f"device: {error}; --device=cpu runs without") from None
    return device


def check_heads(device: torch.device, head: int) -> None:
    """Raise UserError if attention on this device does not support heads of so many numbers."""
    if device.type == "cuda" and (head % 16 or head > 128):
        raise UserError(
            f"model.head_dim: heads have {head} numbers, and on a GPU they have 16, 32, ... or 128; set "
            "model.head_dim or model.heads, or use --device=cpu"
        )
