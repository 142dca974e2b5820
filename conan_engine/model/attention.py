"""Attention over a packed batch: the Triton kernel on CUDA, SDPA by sequences of one length on a CPU."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import conan_kernels

if TYPE_CHECKING:
    from torch import Tensor


# the largest bias, L x L, of sequences of one length on a CPU; beyond it, each block of queries makes its own
BIAS_BYTES = 1 << 28
LATER = object()  # marks sequences that are longer


class Attention:
    """The attention of one forward pass: made once per batch, called once per layer.

    cu_seqlens: int32 [B+1] on the device. alpha in [0, 1]: 0 is causal, 1 bidirectional. In between, the weights of
    future tokens are multiplied by M_ij of `mask` ("column", "row", "uniform"; arXiv 2509.12892, section 3.2).

    On a CPU one call of SDPA takes neighbours of the same length. A caller that sorts its sequences by length has few
    calls.
    """

    def __init__(self, cu_seqlens: Tensor, alpha: float | Tensor, mask: str = "column") -> None:
        self.cu_seqlens, self.alpha, self.mask = cu_seqlens, alpha, mask
        self.runs = None if cu_seqlens.is_cuda else self._runs()
        self.plan = None  # of the kernel: made by the first layer

    def __call__(self, q, k, v):
        """q [T, H, D], k and v [T, G, D] -> [T, H, D]. H is a multiple of G (grouped-query attention)."""
        if self.runs is None:
            if self.plan is None:
                self.plan = conan_kernels.soft_mask_plan(q, self.cu_seqlens, self.alpha, self.mask)
                if not isinstance(self.alpha, torch.Tensor):  # or each layer would make one
                    self.alpha = torch.full((), self.alpha, device=q.device)
            return conan_kernels.soft_mask_attention(
                q, k, v, self.cu_seqlens, self.alpha, mask=self.mask, plan=self.plan
            )
        if not self.runs:
            return q  # no tokens: [0, H, D]
        with torch.autocast("cpu", enabled=False):  # SDPA on a CPU is several times slower in bfloat16
            return self._by_run(*(x.float() if x.dtype == torch.bfloat16 else x for x in (q, k, v)))

    def _by_run(self, q, k, v):
        repeat = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeat, dim=1) if repeat > 1 else x for x in (k, v))
        outputs, sizes = [], [count * length for count, length, _ in self.runs]
        for (count, length, bias), *parts in zip(self.runs, *(x.split(sizes) for x in (q, k, v))):
            heads = [x.unflatten(0, (count, length)).transpose(1, 2) for x in parts]  # [b, H, L, D]
            if bias is LATER:
                out = self._by_block(*heads)
            else:
                bias = None if bias is None else bias.to(q.dtype)
                out = F.scaled_dot_product_attention(*heads, attn_mask=bias, is_causal=self.alpha == 0)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)

    def _by_block(self, q, k, v):
        """The same result as one SDPA call, but the whole bias never exists: the backward pass makes each block's
        again.
        """
        length = q.shape[2]

        def attend(q, k, v, first):
            bias = self._bias(length, first, first + q.shape[2]).to(q.dtype)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

        size = max(1, BIAS_BYTES // (4 * length))
        blocks = enumerate(q.split(size, dim=2))
        return torch.cat(
            [
                checkpoint(attend, block, k, v, i * size, use_reentrant=False, preserve_rng_state=False)
                for i, block in blocks
            ],
            dim=2,
        )

    def _runs(self):
        """[(count, length, bias)]: neighbours that have the same length, without empty ones."""
        lengths = [length for length in self.cu_seqlens.diff().tolist() if length]
        return [(len(list(run)), length, self._whole_bias(length)) for length, run in groupby(lengths)]

    def _whole_bias(self, length):
        """The bias of all queries; None if no bias is needed; LATER if it is too large."""
        if self.alpha in (0, 1):
            return None
        return LATER if 4 * length**2 > BIAS_BYTES else self._bias(length, 0, length)

    def _bias(self, length, first, last):
        """log M of queries `first` to `last` (exclusive): float [last - first, L]."""
        i, j = torch.arange(first + 1, last + 1)[:, None], torch.arange(1, length + 1)
        axis = {"column": j, "row": i, "uniform": torch.tensor(length)}[self.mask]
        future = (self.alpha * length / axis).clamp(max=1).log()
        return torch.where(j <= i, 0.0, future)
