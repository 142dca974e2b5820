"""What the GPUs can do: their products, memory and links, by their vendors' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from conan_engine.errors import UserError


@dataclass(frozen=True)
class Device:
    """A GPU: its peak of dense bfloat16 products in TFLOP/s, its memory in GiB, the rate of that memory in TB/s, and
    what it sends to the others of its machine, in GB/s each way.
    """

    name: str
    tflops: int
    memory: float
    bandwidth: float
    link: float
    hopper: bool = False  # which has attention kernels of its own


# A name that contains another stands before it: the first match counts.
DEVICES = [
    Device("B200", 2250, 179, 8.0, 900),
    Device("B100", 1750, 179, 8.0, 900),
    Device("H100 PCIe", 756, 79, 2.0, 64, hopper=True),
    Device("H100 NVL", 835, 93, 3.9, 300, hopper=True),
    Device("H20", 148, 95, 4.0, 450, hopper=True),
    Device("H200", 989, 140, 4.8, 450, hopper=True),
    Device("H100", 989, 79, 3.35, 450, hopper=True),
    Device("H800", 989, 79, 3.35, 200, hopper=True),
    Device("GH200", 989, 95, 4.0, 450, hopper=True),
    Device("A100", 312, 79, 2.0, 300),
    Device("A800", 312, 79, 2.0, 200),
    Device("A30", 165, 23, 0.93, 100),
    Device("A40", 150, 44, 0.7, 32),
    Device("A10G", 70, 22, 0.6, 32),
    Device("A10", 125, 22, 0.6, 32),
    Device("L40S", 362, 44, 0.86, 32),
    Device("L40", 181, 44, 0.86, 32),
    Device("L4", 121, 22, 0.3, 32),
    Device("RTX 4090", 165, 23, 1.0, 32),
    Device("RTX 3090", 71, 23, 0.94, 32),
]


def of(device: torch.device) -> Device | None:
    """The Device that a torch.device is; None for a CPU and for a GPU that is not in the list."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((one for one in DEVICES if re.search(rf"\b{one.name}\b", name)), None)


def named(name: str) -> Device:
    """The Device of a name as one types it: "h200", "rtx4090". Raises UserError for any other."""
    for one in DEVICES:
        if one.name.replace(" ", "").lower() == re.sub(r"[\s_-]", "", name).lower():
            return one
    raise UserError(f"plan.device is {name!r}; expected one of {', '.join(one.name for one in DEVICES)}")
