"""What the kernels need of a GPU, and the tile sizes for each GPU architecture."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch

OLDEST_GPU = 80  # compute capability times ten; it has bf16 on tensor cores and asynchronous copies
OLDEST_TRITON = (3, 6)

# Keyed by the first architecture that a row is for, then by the largest head dim that it is for: (BM, BN, num_warps,
# num_stages), with maxnreg where that lets ptxas fit one more program on a processor without spills, and options of
# ptxas. Chosen is the largest tile that spills no register, with any Triton of `make matrix`, and fits the shared
# memory of a program; for 90 the fastest on an H200 (docs/performance.md).
ATTENTION = {  # forward, dq, dk_dv: BM rows, BN columns; BM of dq is BN of dk_dv, since they share a plan
    # 163 KB of shared memory; `mma`: a warp owns 16 rows (columns in dk_dv), so more than 4 warps would compute the
    # same 64 rows twice
    80: {
        96: ((128, 32, 8, 2), (64, 32, 4, 2, 255), (32, 64, 4, 3, 255)),
        128: ((128, 32, 8, 2), (64, 16, 4, 3, 255), (32, 64, 4, 3, 255)),
    },
    # 99 KB of shared memory; the same instructions
    86: {
        80: ((128, 32, 8, 2), (64, 32, 4, 2, 255), (32, 64, 4, 2, 255)),
        112: ((128, 16, 8, 3), (64, 16, 4, 3, 255), (16, 64, 4, 2, 255)),
        128: ((128, 32, 8, 2), (64, 16, 4, 3, 255), (16, 64, 4, 2, 255)),
    },
    # 227 KB of shared memory; `wgmma`: a group of 4 warps owns 64 rows (dk_dv on an H200: 1.2 times as fast as with 32
    # rows)
    90: {128: ((128, 64, 8, 3), (128, 64, 8, 3, 255), (64, 128, 8, 3, 255))},
    # 227 KB of shared memory, and sums in tensor memory
    100: {
        64: ((128, 64, 8, 3, 255), (128, 64, 8, 3, 255), (32, 128, 8, 3, 255)),
        80: ((128, 64, 8, 3), (128, 64, 8, 3, 255), (32, 128, 8, 3, 255)),
        96: ((128, 32, 8, 3), (128, 64, 8, 3, 255), (32, 128, 8, 3, 255)),
        # Triton 3.6 compiles a dq with BN = 64 to a trap
        112: ((128, 64, 8, 3), (128, 32, 8, 3, 255), (32, 128, 8, 3, 255)),
        128: ((128, 64, 8, 3), (128, 64, 8, 3, 255), (32, 128, 8, 3, 255)),
    },
    # 99 KB of shared memory; `mma` again, by a ptxas that keeps more in registers
    120: {
        64: ((128, 32, 8, 2), (64, 16, 4, 2, 255), (16, 64, 4, 2, 255)),
        80: ((128, 16, 8, 2), (64, 16, 4, 2, 255), (16, 64, 4, 2, 255)),
        112: ((128, 32, 8, 2, None, "--register-usage-level=0"), (64, 16, 4, 2, 255), (16, 64, 4, 2, 255)),
        128: ((128, 32, 8, 2), (64, 16, 8, 2, 255), (16, 64, 4, 2, 255)),
    },
}
# at every launch: an option of the compiler's whose default becomes False with Triton 3.10, and the counts of
# instructions that the kernels are written for rest on it
FUSION = {"enable_fp_fusion": True}  # a product and a sum become one instruction, FFMA
LAUNCH = ("BM", "BN", "num_warps", "num_stages", "maxnreg", "ptx_options")
# head dims that attention pads with zeros, where that is faster (H200: 1.1 to 1.3 times)
PADDED = {80: {}, 90: {112: 128}, 100: {}}
# forward_tile and weight_tile of InfoNCE: (BM, BN, PIECES); PIECES of a tile are fp32 temporaries, one at a time
SIMILARITIES = {
    80: ((128, 128, 4), (128, 64, 2)),
    90: ((128, 256, 8), (128, 128, 4)),
    100: ((128, 64, 4), (128, 32, 1)),
    120: ((128, 128, 4), (128, 64, 2)),
}
# the same with several positives per query, and for both directions, which need more registers
SIMILARITIES_OF_MORE = {
    80: ((128, 64, 4), (128, 64, 4)),
    90: ((128, 128, 4), (128, 64, 4)),
    100: ((128, 64, 4), (128, 32, 1)),
    120: ((128, 64, 4), (128, 64, 4)),
}
PRODUCT = {80: 128, 90: 256, 120: 128}  # BN of add_product of InfoNCE


def architecture(device: torch.device) -> int:
    """The GPU's compute capability times ten; 90 (Hopper) for Triton's interpreter on a CPU.

    Raises RuntimeError if the kernels do not run: a GPU below 80, or a Triton below 3.6.
    """
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
        import triton  # imported here, since a CPU machine may lack it
    except ImportError:
        return "none"
    return triton.__version__


def check(arch: int, name: str, triton_version: str) -> None:
    """Raise RuntimeError, in one line, unless the kernels run on this architecture with this Triton."""
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
    """Launch options (forward, dq, dk_dv) for a dtype, a head dim and an architecture."""
    by_dim = _from(ATTENTION, arch)
    sizes = by_dim[min(widest for widest in by_dim if D <= widest)]
    if dtype == torch.float32:  # tensor cores lack its full precision: small tiles are for exactness, not speed
        sizes = (32, 32, 8, 1, 255), (32, 16, 8, 2, 255), (16, 32, 8, 2, 255)
        return [{"W": D} | dict(zip(LAUNCH, size)) for size in sizes]
    return [{"W": _from(PADDED, arch).get(D, D)} | dict(zip(LAUNCH, size)) for size in sizes]


def similarity_tiles(dtype: torch.dtype, arch: int, more: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Launch options of InfoNCE (forward_tile, weight_tile). more: with known_ids, or for both directions."""
    if dtype == torch.float32:  # three tf32 products, as exact as fp32 to its last bits
        small = {"PRECISION": "tf32x3", "BM": 64, "BN": 64, "BE": 32, "PIECES": 8, "num_warps": 4, "num_stages": 3}
        return small, small
    common = {"PRECISION": "ieee", "BE": 64, "num_warps": 8, "num_stages": 3}
    forward, weight = _from(SIMILARITIES_OF_MORE if more else SIMILARITIES, arch)
    names = "BM", "BN", "PIECES"
    return common | dict(zip(names, forward)), common | dict(zip(names, weight))


def product_options(dtype: torch.dtype, arch: int) -> tuple[torch.dtype, dict[str, Any]]:
    """The dtype of W and the launch options of add_product of InfoNCE: bf16 for bf16; fp32 for fp16, which cannot
    hold small values of W.
    """
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
    precision = "tf32x3" if dtype == torch.float32 else "tf32"  # tf32 has as many significant bits as fp16
    return torch.float32, {
        "PRECISION": precision,
        "BM": 64,
        "BN": 64,
        "BK": 32,
        "PIECES": 1,
        "num_warps": 4,
        "num_stages": 3,
    }
