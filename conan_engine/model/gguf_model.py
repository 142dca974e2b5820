"""Read a GGUF file to start from: shape and weights of a Llama or Qwen3, dequantised by the `gguf` package."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conan_engine.data import gguf_file
from conan_engine.errors import UserError

ARCHITECTURES = ("llama", "llama-embed", "qwen3")  # llama-embed is what conan_engine.export writes
NAMES = {  # transformers' name of a tensor, without its layer -> the name in GGUF
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SLOWER = "rope_freqs.weight"  # how much slower each pair of a head rotates: Llama 3's RoPE scaling
POOLING = {1: "mean", 3: "last"}  # values of gguf.PoolingType
CANNOT = {  # key after the architecture: what it means, unless it is absent or has one of these values
    "expert_count": ("a mixture of experts", (0,)),
    "rope.scaling.type": ("RoPE scaling of another kind than Llama 3's", ("none",)),
    "attention.scale": ("attention logits of another scale", (0.0,)),
    "logit_scale": ("scaled logits", (0.0, 1.0)),
    "residual_scale": ("a scaled residual stream", (0.0, 1.0)),
    "embedding_scale": ("scaled token vectors", (0.0, 1.0)),
}


def shape(path: str | Path) -> tuple[dict[str, Any], None]:
    """The shape of the model: (the keys of config.Model, None since GGUF has no Matryoshka dims).

    Raises UserError for what this engine cannot do.
    """
    fields, tensors = gguf_file.read(path)
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise UserError(f"{path}: general.architecture is {kind!r}; init_from takes {', '.join(ARCHITECTURES)}")

    def of(key, default=None):
        return fields.get(f"{kind}.{key}", default)

    for key, (what, allowed) in CANNOT.items():
        if of(key) not in (None, *allowed):
            raise UserError(
                f"{path}: {kind}.{key} is {of(key)!r}: {what}, which this engine does not support; use another model"
            )
    for key in ("embedding_length", "block_count", "feed_forward_length", "attention.head_count"):
        if not isinstance(of(key), int):
            raise UserError(f"{path}: {kind}.{key} is {of(key)!r}; expected a whole number, the same for every block")
    width, heads = of("embedding_length"), of("attention.head_count")
    kv_heads, head = of("attention.head_count_kv", heads), of("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if of(key, head) != head:
            raise UserError(
                f"{path}: {kind}.{key} is {of(key)}; expected the size of a head, {head}: this engine has one "
                "size, all of it turned"
            )
    if not isinstance(kv_heads, int):
        raise UserError(
            f"{path}: {kind}.attention.head_count_kv is {kv_heads!r}; expected a whole number, the same for every block"
        )
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path}: holds no token_embd.weight; use a file with a whole model")
    context, window = of("context_length", 2048), of("attention.sliding_window") or math.inf
    theta = float(of("rope.freq_base", 10_000.0))
    found = {
        "layers": of("block_count"),
        "width": width,
        "ffn": of("feed_forward_length"),
        "heads": heads,
        "kv_heads": kv_heads,
        "context": min(context, window),  # up to this length, a window has no effect
        "head_dim": head if head * heads != width else 0,
        # undo the rounding to float32
        "norm_eps": float(f"{of('attention.layer_norm_rms_epsilon', 1e-6):.6g}"),
        "qk_norm": kind == "qwen3",
        "rope_theta": theta,
        "rope_scaling": _scaling(path, tensors[SLOWER], theta, head) if SLOWER in tensors else {},
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tied": "output.weight" not in tensors,
        "embedding_scale": 1.0,
    }
    pooling = of("pooling_type", 0)
    if pooling and pooling not in POOLING:
        raise UserError(
            f"{path}: {kind}.pooling_type is {pooling}; this engine has "
            f"{' and '.join(f'{n} ({name})' for n, name in POOLING.items())}: use a file with one of "
            "these, or none"
        )
    return found | ({"pooling": POOLING[pooling]} if pooling else {}), None


def _scaling(path, tensor, theta, head):
    """The keys of config.RopeScaling, from the factors by which the pairs rotate slower.

    Between the pairs that keep their speed and those that are slowed by the whole factor, the share of the change is a
    straight line over the turns within the original context. low_freq_factor is taken as 1, since only its ratio to the
    others counts.
    """
    slower = np.float64(_values(path, tensor))
    factor = slower.max()
    turns = theta ** (-np.arange(0, head, 2) / head) / (2 * math.pi)  # turns per token
    between = (slower > 1 + 1e-4) & (slower < factor * (1 - 1e-4))
    if between.sum() >= 2:
        kept = (1 / slower[between] - 1 / factor) / (1 - 1 / factor)
        slope, start = np.polyfit(turns[between], kept, 1)
        high, original = 1 - 1 / start, -slope / start
        found = {
            "factor": _round(factor),
            "low_freq_factor": 1.0,
            "high_freq_factor": _round(high),
            "original_context": round(original),
        }
        rounds = found["original_context"] * turns
        kept = ((rounds - 1) / (found["high_freq_factor"] - 1)).clip(0, 1)
        if np.allclose(1 / (kept + (1 - kept) / found["factor"]), slower, rtol=1e-4):
            return found
    raise UserError(f"{path}: {SLOWER} is no RoPE scaling of Llama 3's kind; this engine has that or none")


def _round(value):
    """Round to a whole number if only rounding error separates the value from it."""
    return float(round(value)) if abs(value - round(value)) < 1e-3 * value else float(value)


def _values(path, tensor):
    from gguf import quants

    try:
        return quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise UserError(
            f"{path}: {tensor.name} is quantised as {tensor.tensor_type.name}, which the package gguf cannot "
            "undo; use a file in Q8_0, Q4_K, F16 or the like"
        ) from None


def tensors(path: str | Path) -> dict[str, Callable]:
    """All tensors of a file: {transformers' name: function that returns it as float32}."""
    fields, found = gguf_file.read(path)
    kind = fields["general.architecture"]
    theirs = {own: name for name, own in NAMES.items()}
    heads = {"attn_q": fields[f"{kind}.attention.head_count"]}
    heads["attn_k"] = fields.get(f"{kind}.attention.head_count_kv", heads["attn_q"])

    def value(tensor, part):
        array = _values(path, tensor)
        if kind != "qwen3" and part in heads:
            array = apart(array, heads[part])
        return torch.from_numpy(np.array(array, np.float32))

    renamed = {}
    for full, tensor in found.items():
        if full == SLOWER:
            continue
        layer, _, part = full.removeprefix("blk.").partition(".") if full.startswith("blk.") else ("", "", full)
        part, dot, sort = part.rpartition(".")
        name = theirs.get(part, part) + dot + sort
        renamed[f"layers.{layer}.{name}" if layer else name] = lambda tensor=tensor, part=part: value(tensor, part)
    return renamed


def neighbours(weight: np.ndarray, head: int) -> np.ndarray:
    """Reorder the rows of a projection so that RoPE's pairs (d, d + D/2) of each head become neighbours (2d, 2d + 1).

    llama.cpp rotates neighbours in a Llama. weight [H * D, C]; head: D.
    """
    return np.ascontiguousarray(weight.reshape(-1, 2, head // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape))


def apart(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `neighbours`. heads: H."""
    return np.ascontiguousarray(weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape))
