"""What the kernels need of a machine, and the tiles that each GPU architecture gets."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch

OLDEST_GPU = 80  # compute capability times ten: bf16 on tensor cores, asynchronous copies
OLDEST_TRITON = (3, 6)

# By the architecture from which on a row holds, and the largest head dim for which it does; (BM, BN, num_warps,
# num_stages) each, then, where it helps, maxnreg, with which ptxas spills none to fit one more program on a processor,
# and options of ptxas. What is largest is taken of the sizes that spill no register, in any Triton of `make matrix`,
# and fit a program's shared memory; for 90 what was fastest on an H200 (benchmarks/README.md).
ATTENTION = {  # forward, dq, dk_dv: BM are rows, BN columns. dq's BM is dk_dv's BN, for they share a plan
    # 163 KB of shared memory; `mma`: a warp owns 16 rows (columns in dk_dv), more than 4 would repeat each other's 64
    80: {
        96: ((128, 32, 8, 2), (64, 32, 4, 2, 255), (32, 64, 4, 3, 255)),
        128: ((128, 32, 8, 2), (64, 16, 4, 3, 255), (32, 64, 4, 3, 255)),
    },
    # 99 KB; the same instructions
    86: {
        80: ((128, 32, 8, 2), (64, 32, 4, 2, 255), (32, 64, 4, 2, 255)),
        112: ((128, 16, 8, 3), (64, 16, 4, 3, 255), (16, 64, 4, 2, 255)),
        128: ((128, 32, 8, 2), (64, 16, 4, 3, 255), (16, 64, 4, 2, 255)),
    },
    # 227 KB; `wgmma`: a group of 4 warps owns 64 rows (dk_dv on an H200: 1.2 times as fast as with 32 rows)
    90: {128: ((128, 64, 8, 3), (128, 64, 8, 3, 255), (64, 128, 8, 3, 255))},
    # 227 KB, and sums in tensor memory
    100: {
        64: ((128, 64, 8, 3, 255), (128, 64, 8, 3, 255), (32, 128, 8, 3, 255)),
        80: ((128, 64, 8, 3), (128, 64, 8, 3, 255), (32, 128, 8, 3, 255)),
        96: ((128, 32, 8, 3), (128, 64, 8, 3, 255), (32, 128, 8, 3, 255)),
        # of a dq with BN = 64 Triton 3.6 makes a trap
        112: ((128, 64, 8, 3), (128, 32, 8, 3, 255), (32, 128, 8, 3, 255)),
        128: ((128, 64, 8, 3), (128, 64, 8, 3, 255), (32, 128, 8, 3, 255)),
    },
    # 99 KB; `mma` again, by a ptxas that keeps more in registers
    120: {
        64: ((128, 32, 8, 2), (64, 16, 4, 2, 255), (16, 64, 4, 2, 255)),
        80: ((128, 16, 8, 2), (64, 16, 4, 2, 255), (16, 64, 4, 2, 255)),
        112: ((128, 32, 8, 2, None, "--register-usage-level=0"), (64, 16, 4, 2, 255), (16, 64, 4, 2, 255)),
        128: ((128, 32, 8, 2), (64, 16, 8, 2, 255), (16, 64, 4, 2, 255)),
    },
}
LAUNCH = ("BM", "BN", "num_warps", "num_stages", "maxnreg", "ptx_options")
# head dims that attention fills up with zeros, where that is faster (H200: 1.1 to 1.3 times)
PADDED = {80: {}, 90: {112: 128}, 100: {}}
# InfoNCE's forward_tile, weight_tile: (BM, BN, PIECES), PIECES of a tile are an fp32 temporary one at a time
SIMILARITIES = {
    80: ((128, 128, 4), (128, 64, 2)),
    90: ((128, 256, 8), (128, 128, 4)),
    100: ((128, 64, 4), (128, 32, 1)),
    120: ((128, 128, 4), (128, 64, 2)),
}
# the same for batches with queries of several positives, and for both ways, which take more registers
SIMILARITIES_OF_MORE = {
    80: ((128, 64, 4), (128, 64, 4)),
    90: ((128, 128, 4), (128, 64, 4)),
    100: ((128, 64, 4), (128, 32, 1)),
    120: ((128, 64, 4), (128, 64, 4)),
}
PRODUCT = {80: 128, 90: 256, 120: 128}  # BN of InfoNCE's add_product


def architecture(device: torch.device) -> int:
    """The GPU's compute capability times ten, Hopper's 90 for Triton's interpreter on a CPU. Raises RuntimeError where
    the kernels do not run: a GPU below 80, or a Triton below 3.6."""
    if device.type != "cuda":
        return 90
    return _supported(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _supported(index):
    major, minor = torch.cuda.get_device_capability(index)
    check(major * 10 + minor, torch.cuda.get_device_name(index), _triton_version())
    return major * 10 + minor


def _triton_version():
    try:
        import triton  # here, because a CPU machine may have none
    except ImportError:
        return "none"
    return triton.__version__


def check(arch: int, name: str, triton_version: str) -> None:
    """Raises RuntimeError, in one line, unless the kernels run on that architecture with that Triton."""
    if arch < OLDEST_GPU:
        raise RuntimeError(
            f"{name} has compute capability {arch // 10}.{arch % 10}, and the kernels need 8.0 or higher: "
            "an A100, an RTX 30 or newer"
        )
    found = re.match(r"(\d+)\.(\d+)", triton_version)
    if not found or tuple(map(int, found.groups())) < OLDEST_TRITON:
        raise RuntimeError(
            f"Triton {triton_version} is installed, and the kernels need {'.'.join(map(str, OLDEST_TRITON))} or newer: "
            f"install torch 2.11 or newer, which brings one"
        )


def _from(table, arch):
    return table[max(first for first in table if first <= arch)]


def attention_tiles(dtype: torch.dtype, D: int, arch: int) -> list[dict[str, int]]:
    """(forward, dq, dk_dv): launch options for a dtype, a head dim and an architecture."""
    by_dim = _from(ATTENTION, arch)
    sizes = by_dim[min(widest for widest in by_dim if D <= widest)]
    if dtype == torch.float32:  # no tensor cores at its full precision: small tiles serve exactness, not speed
        sizes = (32, 32, 8, 1, 255), (32, 16, 8, 2, 255), (16, 32, 8, 2, 255)
        return [{"W": D} | dict(zip(LAUNCH, size)) for size in sizes]
    return [{"W": _from(PADDED, arch).get(D, D)} | dict(zip(LAUNCH, size)) for size in sizes]


def similarity_tiles(dtype: torch.dtype, arch: int, more: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """(forward_tile, weight_tile): InfoNCE's launch options; `more`: with known_ids, or both ways."""
    if dtype == torch.float32:  # three tf32 products, as exact as fp32 to its last bits
        small = {"PRECISION": "tf32x3", "BM": 64, "BN": 64, "BE": 32, "PIECES": 8, "num_warps": 4, "num_stages": 3}
        return small, small
    common = {"PRECISION": "ieee", "BE": 64, "num_warps": 8, "num_stages": 3}
    forward, weight = _from(SIMILARITIES_OF_MORE if more else SIMILARITIES, arch)
    names = "BM", "BN", "PIECES"
    return common | dict(zip(names, forward)), common | dict(zip(names, weight))


def product_options(dtype: torch.dtype, arch: int) -> tuple[torch.dtype, dict[str, Any]]:
    """InfoNCE's dtype of W and launch options of add_product: bf16 for bf16. fp16 cannot hold W's small values:
    fp32."""
    if dtype == torch.bfloat16:
        columns = _from(PRODUCT, arch)
        return torch.bfloat16, {
            "PRECISION": "ieee",
            "BM": 128,
            "BN": columns,
            "BK": 64,
            "PIECES": 8,
            "num_warps": 8,
            "num_stages": 3,
        }
    precision = "tf32x3" if dtype == torch.float32 else "tf32"  # tf32 has the significant bits of fp16
    return torch.float32, {
        "PRECISION": precision,
        "BM": 64,
        "BN": 64,
        "BK": 32,
        "PIECES": 1,
        "num_warps": 4,
        "num_stages": 3,
    }
