"""Launches the Triton kernels of soft-masked attention: tile sizes, the plan, one kernel forward, two backward.

Nothing here waits for the device: T, B and the shapes are all that the host knows of a batch.
"""

import torch
import triton

from conan_kernels.soft_mask_gradients import dk_dv_block, dq_block
from conan_kernels.soft_mask_tiles import LOG2_E, forward_block, plan_blocks


def tile_options(dtype, D, major):
    """(forward, dq, dk_dv) for a dtype, a head dim and a compute capability's first number. BM are rows, BN columns. dq's BM is dk_dv's
    BN, for they share a plan. No size spills registers (test_soft_mask_compiled.py): so what is largest is taken.
    fp32 has no tensor cores at its full precision, and its small tiles serve exactness, not speed."""
    names = "BM", "BN", "num_warps", "num_stages"
    if dtype == torch.float32:  # without maxnreg ptxas spills a few of its own accord, to fit three programs on a processor
        sizes, names = ((32, 32, 8, 1, 255), (32, 16, 8, 2, 255), (16, 32, 8, 2, 255)), (*names, "maxnreg")
    elif major in (9, 10, 11):  # 228 KB of shared memory
        sizes = (128, 64, 8, 3), (128, 64, 8, 3), (32, 128, 8, 3)
    else:  # 100 KB on the smallest; a warp owns 16 rows (columns in dk_dv), so more than 4 would repeat each other's 64
        sizes = (128, 32, 8, 2), (64, 32, 4, 3 if D == 128 else 2), (32, 64, 4, 3)
    return [dict(zip(names, size)) for size in sizes]


def parts_of(D):
    """D as a sum of powers of two, largest first: ((first column, width), ...)."""
    widths = [1 << bit for bit in reversed(range(D.bit_length())) if D >> bit & 1]
    return tuple((sum(widths[:number]), width) for number, width in enumerate(widths))


def _options(q):
    return tile_options(q.dtype, q.shape[2], torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 9)


def _plan(cu_seqlens, alpha, T, mask, block):
    """-> plan int32 [slots, 4] and bias fp32 [T], as plan_blocks has them."""
    B = len(cu_seqlens) - 1
    slots = T // block + B
    plan = torch.empty(slots, 4, dtype=torch.int32, device=cu_seqlens.device)
    bias = torch.empty(T, dtype=torch.float32, device=cu_seqlens.device)
    valid = torch.empty(B, dtype=torch.bool, device=cu_seqlens.device)
    plan_blocks[(B, 8)](cu_seqlens, alpha, plan, bias, valid, B, T, slots, MASK=mask, BLOCK=block)
    rule = "cu_seqlens must rise from 0 to T, and alpha lie in [0, 1]"
    torch._assert_async(valid.all(), f"soft_mask_attention: {rule}")
    return plan, bias


def _rows(x):
    """x as the kernels take it: any stride from token to token, the heads of a token side by side."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def forward(q, k, v, cu_seqlens, alpha, mask, scale):
    (T, H, D), G = q.shape, k.shape[1]
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = q.new_empty(T, H, D)
    lse = q.new_empty(H, T, dtype=torch.float32)
    options, _, _ = _options(q)
    with torch.cuda.device_of(q):
        plan, bias = _plan(cu_seqlens, alpha, T, mask, options["BM"])
        forward_block[(len(plan), H)](
            q, k, v, out, lse, plan, bias, T, q.stride(0), k.stride(0), v.stride(0), scale * LOG2_E.value,
            H=H, G=G, D=D, PARTS=parts_of(D), BY_ROW=mask != "column", **options,
        )  # fmt: skip
    return out, lse


def backward(dout, q, k, v, cu_seqlens, alpha, out, lse, mask, scale):
    (T, H, D), G = q.shape, k.shape[1]
    q, k, v, dout = _rows(q), _rows(k), _rows(v), dout.contiguous()
    dq, dk, dv = q.new_empty(T, H, D), k.new_empty(T, G, D), v.new_empty(T, G, D)
    delta = torch.empty_like(lse)
    _, rows, columns = _options(q)
    with torch.cuda.device_of(q):
        plan, bias = _plan(cu_seqlens, alpha, T, mask, rows["BM"])
        strides = T, q.stride(0), k.stride(0), v.stride(0), scale * LOG2_E.value
        shape = {"H": H, "G": G, "D": D, "PARTS": parts_of(D), "BY_ROW": mask != "column"}
        dq_block[(len(plan), H)](q, k, v, out, dout, lse, delta, dq, plan, bias, *strides, **shape, **rows)
        dk_dv_block[(len(plan), G)](q, k, v, dout, lse, delta, dk, dv, plan, bias, *strides, **shape, **columns)
    return dq, dk, dv
