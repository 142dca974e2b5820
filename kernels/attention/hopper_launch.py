"""Launch the forward kernel for Hopper (hopper.py): where it runs, and what it takes beside the plan.

It has passed its tests in a simulator and as machine code, and has not run on a GPU yet. Until it has, it is taken only
where the environment says CONAN_HOPPER=1.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
import triton

from conan_kernels.architecture import FUSION, architecture
from conan_kernels.attention.schedule import BLOCK, LIMIT, ROWS, STAGES, order_slots, split_bias
from conan_kernels.attention.tiles import LOG2_E

if TYPE_CHECKING:
    from torch import Tensor

DIMS = (64, 80, 96, 112, 128)


def wanted(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether CONAN_HOPPER=1 asks for the kernel, and it can take these. If it cannot, one line says so."""
    if os.environ.get("CONAN_HOPPER") != "1" or not q.is_cuda:
        return False
    positions = len(q) * max(map(heads_of_a_token, (q, k, v)))  # coordinates of TMA are int32
    return _runs(architecture(q.device), q.dtype, q.shape[2], positions < 2**31)


@functools.cache
def _runs(arch, dtype, D, few):
    if arch == 90 and dtype != torch.float32 and D in DIMS and few:
        return True
    found = f"sm_{arch}, {dtype} and {D}" if few else "2^31 or more of these"
    needs = f"sm_90, bf16 or fp16, a head dim of {', '.join(map(str, DIMS))} and fewer than 2^31 heads of tokens"
    warnings.warn(f"CONAN_HOPPER=1 needs {needs}, not {found}: the plain kernel runs", stacklevel=2)
    return False


def heads_of_a_token(x: Tensor) -> int:
    """How many heads [D] lie between a token of x [T, N, D] and the next."""
    return x.stride(0) // x.shape[2] if len(x) > 1 else x.shape[1]


def rows(x: Tensor) -> Tensor:
    """x [T, N, D] as TMA takes it: a stride from token to token that is a multiple of D, 16 bytes as alignment."""
    strides = x.stride(0) % x.shape[2] == 0 < x.stride(0) or len(x) == 1
    return (
        x
        if strides and x.stride()[1:] == (x.shape[2], 1) and x.data_ptr() % 16 == 0
        else x.clone(memory_format=torch.contiguous_format)
    )


def order_and_pieces(q: Tensor, plan: Tensor, bias: Tensor, mask: str, scale: float) -> tuple[Tensor, Tensor]:
    """The order of a plan's slots, int32 [slots + 1], and its bias in pieces [slots * BLOCK, 16] of the dtype of q."""
    slots, by_row = len(plan), mask != "column"
    order, pieces = plan.new_empty(slots + 1), q.new_empty(slots * BLOCK, 16)
    grid = triton.cdiv(slots, ROWS.value)
    order_slots[(grid,)](plan, order, slots, BLOCK=BLOCK, BY_ROW=by_row, **FUSION)
    split_bias[(slots,)](bias, plan, pieces, scale * LOG2_E.value, BLOCK=BLOCK, BY_ROW=by_row, **FUSION)
    return order, pieces


def descriptor(x: Tensor, rows: int) -> Any:
    """The tensor map of x [T, N, D] by which TMA reads or writes `rows` tokens of one head of one sequence.

    The element at coordinates (c, y, t, d) is number c (2^34 - N D) + y D + t N D + d. A sequence's token x of l, which
    begins at `start`, and head n are at (LIMIT, (start + l) N + n, LIMIT - l + x, d): LIMIT = 2^30 times 2^34 elements
    of two bytes is 2^65 bytes, and that is 0 modulo 2^64. From t = LIMIT on, where x = l, TMA reads zeros.
    """
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    N, D = heads_of_a_token(x), x.shape[2]
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    shape, strides = [2**31 - 1, 2**31 - 1, LIMIT, D], [2**34 - N * D, D, N * D, 1]
    return TensorDescriptor(x, shape, strides, [1, 1, rows, width(D)], layout)


def arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    order: Tensor,
    pieces: Tensor,
    bias: Tensor,
    mask: str,
    scale: float,
) -> dict[str, Any]:
    """The arguments of hopper.forward_blocks, by name. plan and bias: those of launch.py, with blocks of BLOCK rows."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    (T, H, D), G = q.shape, k.shape[1]
    sources = {"q": rows(q), "k": rows(k), "v": rows(v)}
    heads = {f"heads_{name}": heads_of_a_token(x) for name, x in sources.items()}
    maps = {name: descriptor(x, BLOCK // 2 if name == "q" else BLOCK) for name, x in sources.items()}
    maps["out"] = descriptor(out, BLOCK // 2)
    layout = NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    maps["pieces"] = TensorDescriptor(pieces, list(pieces.shape), [16, 1], [BLOCK, 16], layout)
    memory = {"lse": lse, "plan": plan, "order": order, "bias": bias}
    numbers = {"T": T, "scale": scale * LOG2_E.value}
    constants = {"H": H, "G": G, "BLOCK": BLOCK, "W": width(D), "STAGES": STAGES, "BY_ROW": mask != "column"}
    return maps | memory | numbers | heads | constants


def width(D: int) -> int:
    """Columns of a tile in shared memory: a power of two, the last ones zeros."""
    return 64 if D == 64 else 128


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Tensor, bias: Tensor, mask: str, scale: float
) -> None:
    """Fill out [T, H, D] and lse [H, T]."""
    from conan_kernels.attention import hopper  # imported here: every other GPU does without Gluon

    order, pieces = order_and_pieces(q, plan, bias, mask, scale)
    given = arguments(q, k, v, out, lse, plan, order, pieces, bias, mask, scale)
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    hopper.forward_blocks[(programs,)](**given, num_warps=4, **FUSION)
