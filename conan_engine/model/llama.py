"""Our parameters under transformers' names for a Llama, in both directions.

The block is Llama's (pre-RMSNorm, RoPE, SwiGLU, grouped-query attention, no biases). Qwen3 has an RMSNorm on the
queries and keys of each head as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from conan_engine.data import gguf_file
from conan_engine.errors import UserError
from conan_engine.model import gguf_model, pretrained

if TYPE_CHECKING:
    from torch import Tensor

    from conan_engine.model.transformer import Transformer


# our name -> theirs, within a block and outside; several of theirs are rows of ours, one after another
BLOCK = {
    "attention_norm": ["input_layernorm"],
    "qkv.weight": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "q_norm": ["self_attn.q_norm"],
    "k_norm": ["self_attn.k_norm"],
    "attention_out.weight": ["self_attn.o_proj"],
    "ffn_norm": ["post_attention_layernorm"],
    "gate_up.weight": ["mlp.gate_proj", "mlp.up_proj"],
    "ffn_out.weight": ["mlp.down_proj"],
}
WHOLE = {"embedding": ["embed_tokens"], "norm": ["norm"], "lm_head": ["lm_head"]}


def theirs(name: str) -> list[str]:
    """The names in transformers of one of our parameters."""
    if name in WHOLE:
        return [f"{part}.weight" for part in WHOLE[name]]
    _, i, part = name.split(".", 2)
    return [f"layers.{i}.{other}.weight" for other in BLOCK[part]]


def tensors(model: Transformer) -> dict[str, Tensor]:
    """A whole model's parameters without the LM head: {transformers' name: float32 tensor}.

    The token vectors are multiplied by embedding_scale, as they enter the first block.
    """
    found = {}
    for name, p in model.named_parameters():
        if name != "lm_head":
            p = p.detach().float().cpu()
            p = p * model.config.embedding_scale if name == "embedding" else p
            names = theirs(name)
            parts = p.split(model.get_parameter(name).split_by.sections) if len(names) > 1 else [p]
            found |= {other: part.contiguous() for other, part in zip(names, parts)}
    return found


def load_weights(start: str | Path, model: Transformer, layers: list[int] | None = None) -> None:
    """Copy the weights of a transformers folder or a GGUF file into `model`, in place; each rank copies its part.

    layers: which of the file's blocks become the model's, in order; None means all. Raises UserError for a tensor that
    is missing, damaged, of another shape, or has no place in the model.
    """
    there = gguf_model.tensors(start) if gguf_file.is_gguf(start) else _tensors(start)
    read = set()
    try:
        with torch.no_grad():
            for name, p in model.named_parameters():
                names = theirs(pretrained.source(name, layers))
                missing = [other for other in names if other not in there]
                if missing:
                    raise UserError(
                        f"{start}: holds no {missing[0]}, which its "
                        f"{'metadata promises' if gguf_file.is_gguf(start) else 'config.json promises'}"
                    )
                whole = torch.cat([there[other]() for other in names])
                read.update(names)
                split = getattr(p, "split_by", None)
                expected = [
                    sum(split.sections) if split and dim == split.dim else size for dim, size in enumerate(p.shape)
                ]
                if list(whole.shape) != expected:
                    raise UserError(
                        f"{start}: {' and '.join(names)} have shape {list(whole.shape)}, its "
                        f"{'metadata says' if gguf_file.is_gguf(start) else 'config.json says'} {expected}"
                    )
                p.copy_(split.cut(whole, model.tensor.group) if split else whole)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{start}: cannot read its weights ({error}); fetch it again") from None
    dropped = tuple(f"layers.{i}." for i in range(_blocks(there)) if layers is not None and i not in layers)
    left = sorted(
        name
        for name in there
        if name not in read
        and not name.startswith(dropped)
        and not name.endswith("rotary_emb.inv_freq")
        and name != "lm_head.weight"
    )
    if left:
        raise UserError(f"{start}: holds {left[0]}, which this engine's model has no place for; use another model")


def _tensors(folder):
    """All tensors of a transformers folder: {name: function that returns it as float32}."""
    index = Path(folder, "model.safetensors.index.json")
    try:
        files = (
            sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            if index.exists()
            else ["model.safetensors"]
        )
        opened = [safe_open(Path(folder, file), "pt") for file in files]
        return {
            name.removeprefix("model."): lambda file=file, name=name: file.get_tensor(name).float()
            for file in opened
            for name in file.keys()
        }
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot read its weights ({error}); init_from takes safetensors files") from None


def _blocks(names):
    """The number of blocks that the names belong to."""
    return 1 + max((int(name.split(".")[1]) for name in names if name.startswith("layers.")), default=-1)
