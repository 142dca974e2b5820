"""Attention under the paper's soft mask (arXiv 2509.12892, section 3.2): exact, in memory O(T).

    S_ij = scale * q_i . k_j + log M_ij        M_ij = 1 for j <= i; for j > i, with i and j counted from 1 and l tokens:
    P_i  = softmax(S_i)                               min(alpha * l / j, 1)  "column"
    out_i = sum_j P_ij v_j                            min(alpha * l / i, 1)  "row"
    lse_i = log sum_j exp(S_ij)                       alpha                  "uniform"

    dv_j = sum_i P_ij dout_i                   delta_i = dout_i . out_i
    dS_ij = P_ij (dout_i . v_j - delta_i)      dq_i = scale * sum_j dS_ij k_j        dk_j = scale * sum_i dS_ij q_i

Tiles, online softmax and the recomputation in the backward pass are those of FlashAttention-2 (arXiv 2307.08691). Only
tiles with some M_ij > 0 are visited, and only tiles with some M_ij < 1 apply a mask: at alpha = 0 this costs as much as
causal attention, at alpha = 1 as much as bidirectional attention.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from conan_kernels.architecture import architecture
from conan_kernels.attention.reference import soft_mask_attention_reference

MASKS = ("column", "row", "uniform")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _fused(x):
    """Whether the Triton kernels run: on CUDA, and on a CPU in Triton's interpreter. Otherwise the reference form
    runs.
    """
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


@torch.library.custom_op("conan::soft_mask_plan", mutates_args=())
def _plan(
    cu_seqlens: Tensor, alpha: Tensor, T: int, D: int, dtype: torch.dtype, mask: str, scale: float
) -> list[Tensor]:
    if not cu_seqlens.is_cuda:
        _check_values(cu_seqlens, alpha, T)
    if T == 0 or not _fused(cu_seqlens):
        return []
    architecture(cu_seqlens.device)  # raises an error in one line before anything is imported or launched
    from conan_kernels.attention import launch  # imported here, since a CPU machine may lack Triton

    return launch.plan(cu_seqlens, alpha, T, D, dtype, mask, scale)


@_plan.register_fake
def _(cu_seqlens, alpha, T, D, dtype, mask, scale):
    if T == 0 or not _fused(cu_seqlens):
        return []
    from conan_kernels.attention import launch

    return launch.empty_plan(cu_seqlens, T, D, dtype)


@torch.library.custom_op("conan::soft_mask_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, alpha: Tensor, plan: list[Tensor], mask: str, scale: float
) -> tuple[Tensor, Tensor]:
    if 0 in q.shape:
        return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    if not _fused(q):
        return soft_mask_attention_reference(q, k, v, cu_seqlens, alpha, mask, scale, return_lse=True)
    from conan_kernels.attention import launch

    return launch.forward(q, k, v, plan, mask, scale)


@_forward.register_fake
def _(q, k, v, cu_seqlens, alpha, plan, mask, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("conan::soft_mask_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    alpha: Tensor,
    plan: list[Tensor],
    out: Tensor,
    lse: Tensor,
    mask: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if 0 in q.shape:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if not _fused(q):
        # torch.func, since autograd records nothing within an op
        _, differentiate = torch.func.vjp(
            lambda q, k, v: soft_mask_attention_reference(q, k, v, cu_seqlens, alpha, mask, scale), q, k, v
        )
        return tuple(x.contiguous() for x in differentiate(dout))
    from conan_kernels.attention import launch

    return launch.backward(dout, q, k, v, plan, out, lse, mask, scale)


@_backward.register_fake
def _(dout, q, k, v, cu_seqlens, alpha, plan, out, lse, mask, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    # saved: out and lse [H, T], from which P is computed again, tile by tile, without an L x L matrix
    *vectors, plan, mask, scale = inputs
    ctx.save_for_backward(*vectors, *output, *plan)
    ctx.options = mask, scale


def _differentiate(ctx, dout, _):
    q, k, v, cu_seqlens, alpha, out, lse, *plan = ctx.saved_tensors
    gradients = _backward(dout, q, k, v, cu_seqlens, alpha, plan, out, lse, *ctx.options)
    return *gradients, None, None, [None] * len(plan), None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def soft_mask_plan(
    q: Tensor, cu_seqlens: Tensor, alpha: float | Tensor, mask: str = "column", scale: float | None = None
) -> list[Tensor]:
    """What soft_mask_attention computes of a batch besides its vectors, once for all layers that attend over it.

    Arguments and errors as soft_mask_attention's. Of q only its shape, dtype and device matter.

    Returns:
        The `plan` of calls with these cu_seqlens, alpha, mask and scale. It holds for q of this shape and dtype.
    """
    dtype, alpha, scale = _dtype(q), _alpha(q, alpha), _scale(q, scale)
    _check(q, q, q, cu_seqlens, alpha, mask, scale)
    return _plan(cu_seqlens.contiguous(), alpha, len(q), q.shape[2], dtype, mask, scale)


def soft_mask_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    alpha: float | Tensor,
    mask: str = "column",
    scale: float | None = None,
    return_lse: bool = False,
    plan: list[Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each sequence of a packed batch: to the past in full, to the future by alpha.

    Args:
        q: [T, H, D]; bf16, fp16 or fp32. D is a multiple of 16 from 16 to 128. Tokens may have any stride. Under
            autocast, q, k and v get its dtype.
        k: [T, G, D], of the dtype of q. H is a multiple of G: query head h reads KV head h // (H // G), without a copy.
        v: [T, G, D], of the dtype of q.
        cu_seqlens: int32 [B+1] on the same device, rising from 0 to T; sequence b has the tokens cu_seqlens[b] to
            cu_seqlens[b+1].
        alpha: in [0, 1]; 0 is causal, 1 bidirectional. A number, or a 0-d tensor on the device of q, which may change
            from call to call without synchronisation or compilation (under torch.compile a number may become a
            constant). It gets no gradient.
        mask: "column", "row" or "uniform", the form of M above.
        scale: a positive number; D ** -0.5 by default.
        return_lse: also return lse.
        plan: that of soft_mask_plan for these arguments; made here if it is None. Calls that share one take less time
            on the host.

    Returns:
        out [T, H, D] in the dtype of q; with return_lse also lse [H, T], fp32, natural logarithm, without gradient. The
            same inputs give the same bits, forward and backward.

    Raises:
        ValueError: for arguments that do not fit. Wrong values in cu_seqlens or alpha, which only the device knows, are
            a CUDA device-side assertion; on a CPU they are a ValueError.
        RuntimeError: on a GPU or with a Triton that is too old.

    On a CPU the reference form runs, with memory O(H * L^2).
    """
    alpha, scale = _alpha(q, alpha), _scale(q, scale)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(_dtype(q)) for x in (q, k, v))
    _check(q, k, v, cu_seqlens, alpha, mask, scale)
    cu_seqlens = cu_seqlens.contiguous()
    if plan is None:
        plan = _plan(cu_seqlens, alpha, len(q), q.shape[2], q.dtype, mask, scale)
    elif plan and len(plan[0]) != len(q):
        raise ValueError(f"plan must be of the {len(q)} tokens of q, not of {len(plan[0])}")
    out, lse = _forward(q, k, v, cu_seqlens, alpha, plan, mask, scale)
    return (out, lse.detach()) if return_lse else out


def _dtype(q):
    device = q.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype


def _alpha(q, alpha):
    if isinstance(alpha, Tensor):
        return alpha.detach().float()
    if not 0 <= alpha <= 1:  # also false for NaN
        raise ValueError(f"alpha must lie in [0, 1], not {alpha}")
    return torch.full((), alpha, dtype=torch.float32, device=q.device)


def _scale(q, scale):
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _check(q, k, v, cu_seqlens, alpha, mask, scale):
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[::2] != k.shape[::2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q must be [T, H, D], k and v [T, G, D]; their shapes are {shapes}")
    (_, H, D), G = q.shape, k.shape[1]
    if G == 0 or H % G:
        raise ValueError(f"the number of query heads must be a multiple of that of KV heads; they are {H} and {G}")
    if D % 16 or not 16 <= D <= 128:
        raise ValueError(f"the head dim must be a multiple of 16 from 16 to 128, not {D}")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v must be of one dtype, bfloat16, float16 or float32, not {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be int32 [B+1], not {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if len(cu_seqlens) == 1 and len(q):
        raise ValueError(f"cu_seqlens holds no sequence, but there are {len(q)} tokens")
    if alpha.ndim:
        raise ValueError(f"alpha must be a number or a 0-d tensor, not of shape {list(alpha.shape)}")
    devices = [x.device for x in (q, k, v, cu_seqlens, alpha)]
    if len(set(devices)) > 1:
        raise ValueError(f"q, k, v, cu_seqlens and alpha must be on one device, not {', '.join(map(str, devices))}")
    if mask not in MASKS:
        raise ValueError(f"mask must be one of {', '.join(MASKS)}, not {mask!r}")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be a positive number, not {scale}")


def _check_values(cu_seqlens, alpha, T):
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T or bounds != sorted(bounds):
        shown = str(bounds) if len(bounds) <= 8 else f"{bounds[:4]} ... {bounds[-4:]}"
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {T}; it is {shown}")
    if not 0 <= alpha.item() <= 1:
        raise ValueError(f"alpha must lie in [0, 1], not {alpha.item()}")
