"""The transformer (recipe: pre-RMSNorm, RoPE, SwiGLU, grouped-query attention, no biases, tied embedding) over packed
sequences. Letters: B sequences, T packed tokens, H query heads, G KV heads, D head size, C width, F FFN width, V vocabulary."""

import torch
import torch.nn.functional as F
from torch import nn

from conan_engine.attention import Attention
from conan_engine.cpu import multiplies_bfloat16

NORM_EPS = 1e-6


class Block(nn.Module):
    """One decoder block. The two inputs of each half are projected by one matrix: fewer, larger products."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.width // config.heads
        self.attention_norm = nn.Parameter(torch.ones(config.width))
        self.qkv = nn.Linear(config.width, (config.heads + 2 * config.kv_heads) * self.head_dim, bias=False)
        self.attention_out = nn.Linear(config.width, config.width, bias=False)
        self.ffn_norm = nn.Parameter(torch.ones(config.width))
        self.gate_up = nn.Linear(config.width, 2 * config.ffn, bias=False)
        self.ffn_out = nn.Linear(config.ffn, config.width, bias=False)

    def forward(self, x, cos, sin, attention):  # x [T, C]
        qkv = self.qkv(rms_norm(x, self.attention_norm)).view(len(x), self.heads + 2 * self.kv_heads, self.head_dim)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)  # [T, H + G, D], [T, G, D]
        q, k = rotate(qk, cos, sin).split([self.heads, self.kv_heads], dim=1)
        out = attention(q, k, v)
        x = x + self.attention_out(out.flatten(1))
        gate, up = self.gate_up(rms_norm(x, self.ffn_norm)).chunk(2, dim=-1)  # [T, F] twice
        return x + self.ffn_out(F.silu(gate) * up)


class Transformer(nn.Module):
    def __init__(self, config, vocab_size, precision="float32"):
        """config: conan_engine.config.Model; precision: as conan_engine.config.Config has it. Weights are float32, left as
        they come; `init_weights` draws them."""
        super().__init__()
        self.config, self.precision = config, precision
        self.embedding = nn.Parameter(torch.empty(vocab_size, config.width))  # [V, C]; also the LM head (tied)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.Parameter(torch.ones(config.width))

    def init_weights(self, seed):
        """Normal(0, 0.02), and 0.02 / sqrt(2 * layers) for what is added to the residual stream (GPT-2)."""
        generator = torch.Generator(self.embedding.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith("_out.weight")
                std = 0.02 / (2 * self.config.layers) ** 0.5 if residual else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)
            else:
                nn.init.ones_(parameter)
        return self

    def in_bfloat16(self):
        """Whether the matrix products are: as set, or where the device multiplies bfloat16 faster than float32."""
        device = self.embedding.device
        return self.precision == "bfloat16" or (self.precision == "auto" and (device.type == "cuda" or (device.type == "cpu" and multiplies_bfloat16())))

    def forward(self, tokens, cu_seqlens, alpha=0.0, mask="column"):
        """tokens int [T], cu_seqlens int32 [B+1], alpha in [0, 1] (0 causal, 1 bidirectional) -> hidden states [T, C]."""
        attention = Attention(cu_seqlens, alpha, mask)
        x = F.embedding(tokens.long(), self.embedding) * self.config.embedding_scale  # [T, C]
        cos, sin = rope(cu_seqlens, len(tokens), self.blocks[0].head_dim, self.config.rope_theta, x.dtype)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.in_bfloat16()):
            for block in self.blocks:
                x = block(x, cos, sin, attention)
        return rms_norm(x, self.norm)

    def embed(self, tokens, cu_seqlens, alpha=1.0, mask="column"):
        """One vector a sequence, not normalised: [B, C] float32. A sequence of no tokens gives zeros."""
        hidden = self(tokens, cu_seqlens, alpha, mask).float()
        lengths = cu_seqlens.diff().long()
        if self.config.pooling == "last":
            pooled = hidden.new_zeros(len(lengths), hidden.shape[1])
            some = lengths > 0
            return pooled.index_put((some,), hidden[cu_seqlens[1:].long()[some] - 1])
        rows = torch.repeat_interleave(lengths, output_size=len(tokens))
        summed = hidden.new_zeros(len(lengths), hidden.shape[1]).index_add(0, rows, hidden)
        return summed / lengths.clamp(min=1)[:, None]


def rms_norm(x, weight):
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), NORM_EPS)


def rope(cu_seqlens, total, head_dim, theta, dtype):
    """cos and sin of each packed token's angle within its own sequence: [T, 1, D/2] each (arXiv 2104.09864)."""
    device = cu_seqlens.device
    starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff().long(), output_size=total)
    positions = torch.arange(total, device=device) - starts
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = positions[:, None, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Turn the pairs (x[d], x[d + D/2]) of each head: x [T, H, D]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def count_parameters(config, vocab_size):
    """How many weights the shape has, without allocating any."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config, vocab_size).parameters())


def memory_per_device(config, vocab_size, tokens, ranks):
    """An upper estimate, in bytes, of what one device holds while it trains.

    Weights and gradients in float32 (the matrix products run in bfloat16 on CUDA), two Adam moments shared out over the
    ranks (ZeRO stage 1), and the activations that the backward needs of so many tokens.
    """
    parameters = count_parameters(config, vocab_size)
    kv = config.kv_heads * config.width // config.heads
    per_layer = 8 * config.width + 4 * kv + 4 * config.ffn  # norms, q k v twice (rotated), out, gate, up, silu, product
    activations = tokens * (config.layers * per_layer + 4 * config.width) * 4
    return parameters * (4 + 4) + parameters * 8 // ranks + activations
