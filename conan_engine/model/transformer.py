"""The transformer over packed sequences: pre-RMSNorm, RoPE, SwiGLU, grouped-query attention, no biases.

Shapes: B sequences, T packed tokens, H query heads, G KV heads, D head size, C width, F FFN width, V vocabulary. N
ranks may share a model (tensor_parallel.py); H, G, F and V are then a rank's own part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from conan_engine.model.attention import Attention
from conan_engine.model.lm_head import linear_cross_entropy
from conan_engine.model.rms_norm import add_rms_norm
from conan_engine.model.rope import rotate, turns
from conan_engine.model.swiglu import swiglu
from conan_engine.parallel.tensor_parallel import TensorParallel
from conan_kernels import pointwise

if TYPE_CHECKING:
    from torch import Tensor

    from conan_engine.config import Model as ModelSettings
    from conan_engine.parallel.mesh import Group


STD = 0.02  # standard deviation of a newly drawn weight


class Block(nn.Module):
    """One decoder block. One matrix each projects to queries, keys and values, and to both inputs of the SwiGLU."""

    def __init__(self, config: ModelSettings, tensor: TensorParallel) -> None:
        super().__init__()
        self.tensor, self.eps, self.head_dim = tensor, config.norm_eps, config.head
        self.heads, self.kv_heads = config.heads // tensor.group.world, config.kv_heads // tensor.group.world
        q, kv = config.heads * self.head_dim, config.kv_heads * self.head_dim
        self.attention_norm = nn.Parameter(torch.ones(config.width))
        self.qkv = tensor.columns(config.width, q, kv, kv)
        self.q_norm, self.k_norm = (
            nn.Parameter(torch.ones(self.head_dim)) if config.qk_norm else None for _ in range(2)
        )
        self.attention_out = tensor.rows(q, config.width)
        self.ffn_norm = nn.Parameter(torch.ones(config.width))
        self.gate_up = tensor.columns(config.width, config.ffn, config.ffn)
        self.ffn_out = tensor.rows(config.ffn, config.width)

    def forward(
        self, x: Tensor, y: Tensor | None, cos: Tensor, sin: Tensor, attention: Attention
    ) -> tuple[Tensor, Tensor]:
        """x [T / N, C] and y, what the block before adds to it, or None -> the same for the next block.

        The sum x + y is computed together with the norm that reads it.
        """
        total = len(cos)
        x, normed = add_rms_norm(x, y, self.attention_norm, self.eps)
        out = attention(*self.project(self.tensor.gather(normed, total), cos, sin))
        x, normed = add_rms_norm(x, self.tensor.scatter(self.attention_out(out.flatten(1))), self.ffn_norm, self.eps)
        return x, self.tensor.scatter(self.feed_forward(self.tensor.gather(normed, total)))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., C] -> queries [..., H, D], keys and values [..., G, D]; queries and keys rotated by cos and sin."""
        heads, groups = self.heads, self.kv_heads
        qkv = self.qkv(x).unflatten(-1, (heads + 2 * groups, self.head_dim))
        if self.q_norm is None:
            return rotate(qkv, cos, sin, heads + groups).split([heads, groups, groups], dim=-2)
        qk, v = qkv.split([heads + groups, groups], dim=-2)
        weights = torch.cat((self.q_norm.expand(heads, -1), self.k_norm.expand(groups, -1)))
        qk = F.rms_norm(qk.to(cos.dtype), [self.head_dim], None, self.eps) * weights
        q, k = rotate(qk, cos, sin, heads + groups).split([heads, groups], dim=-2)
        return q, k, v

    def feed_forward(self, x: Tensor) -> Tensor:
        """SwiGLU: x [..., C] -> [..., C]."""
        return self.ffn_out(swiglu(self.gate_up(x)))


class Transformer(nn.Module):
    """The model: token table, blocks, last norm, and, for the language-modelling stages, an LM head."""

    def __init__(
        self,
        config: ModelSettings,
        vocab_size: int,
        precision: str = "float32",
        tensor: Group | None = None,
        recompute: str = "none",
    ) -> None:
        """Args:
            config: the shape, conan_engine.config.Model.
            vocab_size: the tokenizer's; used where the config says 0.
            precision: of the matrix products, as conan_engine.config.Config has it.
            tensor: the mesh.Group of ranks that share this model.
            recompute: as conan_engine.config.Config has it.

        The weights are float32 and not initialised; `init_weights` draws them.
        """
        super().__init__()
        vocab_size = config.vocab_size or vocab_size
        self.config, self.precision, self.tensor, self.recompute = config, precision, TensorParallel(tensor), recompute
        self.embedding = self.tensor.table(vocab_size, config.width)  # [V, C]
        self.lm_head = None if config.tied else self.tensor.table(vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, self.tensor) for _ in range(config.layers))
        self.norm = nn.Parameter(torch.ones(config.width))

    def init_weights(self, seed: int) -> Transformer:
        """Draw the weights: Normal(0, STD), and STD / sqrt(2 * layers) for what is added to the residual stream
        (GPT-2).

        The numbers are the same for any number of ranks.
        """
        generator = torch.Generator(self.embedding.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith("_out.weight")
                std = STD / (2 * self.config.layers) ** 0.5 if residual else STD
                shape = [
                    sum(parameter.split_by.sections) if dim == parameter.split_by.dim else size
                    for dim, size in enumerate(parameter.shape)
                ]
                whole = nn.init.normal_(parameter.new_empty(shape), std=std, generator=generator)
                parameter.data.copy_(parameter.split_by.cut(whole, self.tensor.group))
            else:
                nn.init.ones_(parameter)
        return self

    def in_bfloat16(self) -> bool:
        """Whether matrix products are in bfloat16: as set, else on a GPU. (precision.py measures it on a CPU.)"""
        return self.precision == "bfloat16" or (self.precision == "auto" and self.embedding.is_cuda)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, alpha: float | Tensor = 0.0, mask: str = "column") -> Tensor:
        """tokens int [T], cu_seqlens int32 [B+1], alpha in [0, 1] (0 causal, 1 bidirectional) -> hidden states [T / N,
        C].

        These are the hidden states of this rank's tokens; of all tokens if no other rank shares the model.
        """
        attention = Attention(cu_seqlens, alpha, mask)
        x = self.tensor.look_up(tokens.long(), self.embedding)
        x = x.to(torch.promote_types(x.dtype, torch.float32)) * self.config.embedding_scale  # [T / N, C]
        cos, sin = turns(positions(cu_seqlens, len(tokens)), self.config, x.dtype)
        y = None
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.in_bfloat16()):
            for block in self.blocks:
                if self.recompute == "block" and torch.is_grad_enabled():
                    # no dropout, so no random state to keep
                    x, y = checkpoint(block, x, y, cos, sin, attention, use_reentrant=False, preserve_rng_state=False)
                else:
                    x, y = block(x, y, cos, sin, attention)
        return add_rms_norm(x, y, self.norm, self.config.norm_eps)[1]

    def embed(self, tokens: Tensor, cu_seqlens: Tensor, alpha: float | Tensor = 1.0, mask: str = "column") -> Tensor:
        """One vector per sequence, not normalised: float32 [B, C], the same on all ranks. An empty sequence gives
        zeros.
        """
        hidden = self(tokens, cu_seqlens, alpha, mask)
        mine, lengths = self.tensor.mine(len(tokens)), cu_seqlens.diff().long()
        if self.config.pooling == "last":
            last = cu_seqlens[1:].long() - 1
            some = (lengths > 0) & (last >= mine.start) & (last < mine.stop)
            return self.tensor.sum(
                hidden.new_zeros(len(lengths), hidden.shape[1]).index_put((some,), hidden[last[some] - mine.start])
            )
        if hidden.is_cuda:
            sums = pointwise.sum_sequences(hidden, cu_seqlens.clamp(mine.start, mine.stop) - mine.start)
        else:
            rows = torch.repeat_interleave(lengths, output_size=len(tokens))[mine]
            sums = hidden.new_zeros(len(lengths), hidden.shape[1]).index_add(0, rows, hidden)
        return self.tensor.sum(sums) / lengths.clamp(min=1)[:, None]

    def next_token_loss(
        self, tokens: Tensor, cu_seqlens: Tensor, targets: Tensor, alpha: float | Tensor = 0.0, mask: str = "column"
    ) -> Tensor:
        """Summed cross entropy of the tokens `targets`, int64 [T], -100 where there is nothing to learn.

        Returns a float32 scalar, the same on all ranks.
        """
        hidden = self(tokens, cu_seqlens, alpha, mask)
        hidden = self.tensor.gather(hidden.bfloat16() if self.in_bfloat16() else hidden, len(tokens))
        return linear_cross_entropy(
            hidden, self.embedding if self.lm_head is None else self.lm_head, targets, group=self.tensor.group
        )[0]


def positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """The position of each packed token within its own sequence: int64 [T]."""
    starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff().long(), output_size=total)
    return torch.arange(total, device=cu_seqlens.device) - starts


def count_parameters(config: ModelSettings, vocab_size: int) -> int:
    """The number of weights of a shape, without allocating any."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config, vocab_size).parameters())
