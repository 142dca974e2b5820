"""Launch the kernels for Hopper: where they run, and what they take beside the plan.

CONAN_HOPPER=0 in the environment runs the plain kernels instead, to compare the two.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch

from conan_kernels.architecture import FUSION, architecture
from conan_kernels.attention.hopper import BLOCK, DIMS, LIMIT, LOG2_E, PAIRS, STAGES

if TYPE_CHECKING:
    from torch import Tensor


def runs(device: torch.device, D: int, dtype: torch.dtype) -> bool:
    """Whether these kernels run: bf16 or fp16 on sm_90, with a head dim of DIMS."""
    if device.type != "cuda" or os.environ.get("CONAN_HOPPER") == "0":
        return False
    return _runs(architecture(device), D, dtype)


@functools.cache
def _runs(arch, D, dtype):
    if arch != 90 or dtype == torch.float32:
        return False
    if D not in DIMS:
        dims = ", ".join(map(str, DIMS))
        warnings.warn(f"the kernels for sm_90 take a head dim of {dims}, not {D}: the plain kernels run", stacklevel=2)
    return D in DIMS


def check(slots: Tensor) -> None:
    """Raise ValueError if rows of whole tiles are too many for TMA, whose coordinates are int32. Those of q, k and v
    never are: 2^31 heads of 64 numbers would need 256 GiB.
    """
    if len(slots) * BLOCK >= 2**31:
        most = 2**31 // BLOCK
        raise ValueError(f"tokens / {BLOCK} + sequences must be below {most}, not {len(slots)}: attend in parts")


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


def descriptor(x: Tensor, rows: int) -> Any:
    """The tensor map of x [T, N, D] by which TMA reads or writes `rows` tokens of one head of one sequence.

    The element at coordinates (c, y, t, d) is number c (2^34 - N D) + y D + t N D + d. A sequence's token x of l, which
    begins at `start`, and head n are at (LIMIT, (start + l) N + n, LIMIT - l + x, d): LIMIT = 2^30 times 2^34 elements
    of two bytes is 2^65 bytes, and that is 0 modulo 2^64. From t = LIMIT on, where x = l, TMA reads zeros.
    """
    N, D = heads_of_a_token(x), x.shape[2]
    shape, strides = [2**31 - 1, 2**31 - 1, LIMIT, D], [2**34 - N * D, D, N * D, 1]
    return _tensor_map(x, shape, strides, [1, 1, rows, width(D)], _layout(128, 16, 4))


def flat_descriptor(x: Tensor, numbers: int) -> Any:
    """The tensor map of all of x by which TMA reads that many numbers in a row."""
    return _tensor_map(x, [x.numel()], [1], [numbers], _layout(0, 8 * x.element_size(), 1))


@functools.cache
def _layout(swizzle, bits, rank):
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=rank)


def _tensor_map(*arguments):
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # every other GPU does without Gluon

    return TensorDescriptor(*arguments)


def forward_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    order: Tensor,
    closed_bias: Tensor,
    pieces: Tensor,
    bias: Tensor,
    mask: str,
    scale: float,
) -> dict[str, Any]:
    """The arguments of forward.forward_blocks, by name. plan to bias: those of ../launch.py's empty_plan."""
    q, k, v = map(rows, (q, k, v))
    maps = {"q": descriptor(q, BLOCK // 2), "k": descriptor(k, BLOCK), "v": descriptor(v, BLOCK)}
    maps |= {"out": descriptor(out, BLOCK // 2), "closed_bias": flat_descriptor(closed_bias, BLOCK)}
    columns = pieces.shape[1]
    maps["pieces"] = _tensor_map(pieces, list(pieces.shape), [columns, 1], [BLOCK, columns], _layout(32, 16, 2))
    memory = {"lse": lse, "plan": plan, "order": order, "bias": bias, "T": len(q)}
    return maps | memory | _shared_arguments(q, k, v, mask, scale, STAGES)


def _shared_arguments(q, k, v, mask, scale, stages):
    heads = {f"heads_{name}": heads_of_a_token(x) for name, x in (("q", q), ("k", k), ("v", v))}
    shape = {"H": q.shape[1], "G": k.shape[1], "BLOCK": BLOCK, "D": q.shape[2], "W": width(q.shape[2])}
    return heads | shape | {"scale": scale * LOG2_E, "STAGES": stages, "BY_ROW": mask != "column"}


def backward_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    gradients: dict[str, Tensor],
    sums: dict[str, Tensor],
    plan: Tensor,
    order: Tensor,
    bias: Tensor,
    mask: str,
    scale: float,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of dq.dq_blocks and of dk_dv.dk_dv_blocks, by name. sums: sums_of_rows of ../launch.py
    and the plan's closed_bias.
    """
    q, k, v, dout = map(rows, (q, k, v, dout))
    HALF = BLOCK // 2
    inputs = {"q": q, "k": k, "v": v, "dout": dout} | gradients
    maps = {name: descriptor(x, HALF) for name, x in inputs.items()}
    common = {"plan": plan, "order": order, "padded_rows": sums["log_sums"].shape[1]}
    common |= _shared_arguments(q, k, v, mask, scale, PAIRS[width(q.shape[2])])
    of_dq = common | sums | {"closed_bias": flat_descriptor(sums["closed_bias"], HALF)}
    of_dq |= {name: maps[name] for name in ("q", "k", "v", "dout", "dq")}
    of_dk = common | {name: maps[name] for name in ("q", "k", "v", "dout", "dk", "dv")}
    of_dk |= {name: flat_descriptor(sums[name], HALF) for name in ("log_sums", "future_log_sums", "deltas")}
    return of_dq, of_dk | {"bias": bias}


def width(D: int) -> int:
    """Columns of a tile in shared memory: a power of two, the last ones zeros."""
    return 64 if D == 64 else 128


def forward(*arguments: Any) -> None:
    """Fill out [T, H, D] and lse [H, T]. arguments: those of forward_arguments."""
    from conan_kernels.attention.hopper.forward import forward_blocks

    given = forward_arguments(*arguments)
    forward_blocks[(_programs(given["lse"]),)](**given, num_warps=4, **FUSION)


def backward(*arguments: Any) -> None:
    """Fill dq [T, H, D], dk and dv [T, G, D]. arguments: those of backward_arguments."""
    from conan_kernels.attention.hopper.dk_dv import dk_dv_blocks
    from conan_kernels.attention.hopper.dq import dq_blocks

    of_dq, of_dk = backward_arguments(*arguments)
    programs = _programs(of_dq["log_sums"])
    dq_blocks[(programs,)](**of_dq, num_warps=4, **FUSION)
    dk_dv_blocks[(programs,)](**of_dk, num_warps=4, **FUSION)


def _programs(x):
    return torch.cuda.get_device_properties(x.device).multi_processor_count
