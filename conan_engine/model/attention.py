"""Attention over a packed batch: the Triton kernel on CUDA, bucketed SDPA on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import conan_kernels

if TYPE_CHECKING:
    from torch import Tensor


# the largest bias, L x L per sequence, that a bucket may have on a CPU; beyond it, each block of queries makes its own
BIAS_BYTES = 1 << 28
LATER = object()  # marks such a bucket


class Attention:
    """The attention of one forward pass: made once per batch, called once per layer.

    cu_seqlens: int32 [B+1] on the device. alpha in [0, 1]: 0 is causal, 1 bidirectional. In between, the weights of
    future tokens are multiplied by M_ij of `mask` ("column", "row", "uniform"; arXiv 2509.12892, section 3.2).
    """

    def __init__(self, cu_seqlens: Tensor, alpha: float | Tensor, mask: str = "column") -> None:
        self.cu_seqlens, self.alpha, self.mask = cu_seqlens, alpha, mask
        self.buckets = None if cu_seqlens.is_cuda else self._buckets()

    def __call__(self, q, k, v):
        """q [T, H, D], k and v [T, G, D] -> [T, H, D]. H is a multiple of G (grouped-query attention)."""
        if self.buckets is None:
            return conan_kernels.soft_mask_attention(q, k, v, self.cu_seqlens, self.alpha, mask=self.mask)
        if not self.buckets:
            return q  # no tokens: [0, H, D]
        with torch.autocast("cpu", enabled=False):  # SDPA on a CPU is several times slower in bfloat16
            return self._by_bucket(*(x.float() if x.dtype == torch.bfloat16 else x for x in (q, k, v)))

    def _by_bucket(self, q, k, v):
        repeat = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeat, dim=1) if repeat > 1 else x for x in (k, v))
        outputs = []
        for rows, own, lengths, bias in self.buckets:
            # [b, H, L, D]
            heads = [x.index_select(0, rows).view(*own.shape, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
            if bias is LATER:
                out = self._by_block(*heads, lengths, own)
            else:
                bias = None if bias is None else bias.to(q.dtype)
                out = F.scaled_dot_product_attention(*heads, attn_mask=bias, is_causal=self.alpha == 0)
            outputs.append(out.transpose(1, 2)[own])
        return torch.cat(outputs).index_select(0, self.back)

    def _by_block(self, q, k, v, lengths, own):
        """The same result as one SDPA call, but the whole bias never exists: the backward pass makes each block's
        again.
        """

        def attend(q, k, v, first):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=self._bias(lengths, own, first, first + q.shape[2]).to(q.dtype)
            )

        size = max(1, BIAS_BYTES // (4 * own.numel()))
        blocks = enumerate(q.split(size, dim=2))
        return torch.cat(
            [
                checkpoint(attend, block, k, v, i * size, use_reentrant=False, preserve_rng_state=False)
                for i, block in blocks
            ],
            dim=2,
        )

    def _buckets(self):
        """Group sequences of similar length, so that a padded SDPA call wastes little.

        A bucket holds up to 8 tokens, or up to 1.5 times its shortest sequence. It is (rows int64 [b*L] of the packed
        batch, own bool [b, L], lengths [b], bias).
        """
        starts, lengths = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff().long()
        order = lengths.argsort(stable=True)
        order = order[lengths[order] > 0]
        buckets, gathered, first = [], [], 0
        while first < len(order):
            longest = max(8, int(lengths[order[first]] * 1.5))
            last = first + int((lengths[order[first:]] <= longest).sum())
            ids = order[first:last]
            length = lengths[ids]
            column = torch.arange(int(length.max()))
            own = column < length[:, None]  # [b, L]
            rows = starts[ids, None] + torch.where(own, column, 0)
            gathered.append(rows[own])
            buckets.append((rows.flatten(), own, length, self._whole_bias(length, own)))
            first = last
        if gathered:
            order = torch.cat(gathered)
            self.back = torch.empty_like(order)
            self.back[order] = torch.arange(len(order))
        return buckets

    def _whole_bias(self, length, own):
        """The bias of all queries; None if no bias is needed; LATER if it is too large."""
        # padding comes after every query, so a causal mask hides it too
        if self.alpha == 0 or (self.alpha == 1 and own.all()):
            return None
        return LATER if 4 * own.numel() * own.shape[1] > BIAS_BYTES else self._bias(length, own, 0, own.shape[1])

    def _bias(self, length, own, first, last):
        """log M of queries `first` to `last` (exclusive): float [b, 1, last - first, L], -inf where a query may not
        look.
        """
        i, j = torch.arange(first + 1, last + 1)[:, None], torch.arange(1, own.shape[1] + 1)
        lengths = length[:, None, None]
        axis = {"column": j, "row": i, "uniform": lengths}[self.mask]
        future = (self.alpha * lengths / axis).clamp(max=1).log().expand(len(length), len(i), len(j))
        bias = torch.where(j <= i, 0.0, future).masked_fill_(~own[:, None, :], -torch.inf)
        return bias[:, None]
