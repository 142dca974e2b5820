"""Write a run as one ONNX graph from ids and mask to unit vectors, with the tokenizer beside it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from conan_engine.export.sentence_transformers import write_tokenizer
from conan_engine.model.rope import turns

if TYPE_CHECKING:
    from torch import Tensor

    from conan_engine.evaluation.encoder import Encoder
    from conan_engine.model.transformer import Transformer


OPSET = 18
INLINE = 10**9  # bytes of weights that model.onnx itself may hold; more go into model.onnx.data (protobuf ends at 2 GB)


class Padded(nn.Module):
    """The model over padded texts instead of packed ones: ids, mask int64 [B, L] -> unit vectors float32 [B, C]."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        config = self.model.config

        def rms_norm(x, weight):
            return F.rms_norm(x, weight.shape, weight, config.norm_eps)

        cos, sin = turns(torch.arange(ids.shape[1]), config, torch.float32)  # [L, 1, D/2]
        own = mask.bool()
        # an empty text attends to its padding, which does not matter: attending to nothing would give NaN
        seen = (own | ~own.any(1, keepdim=True))[:, None, None, :]
        x = F.embedding(ids, self.model.embedding) * config.embedding_scale  # [B, L, C]
        for block in self.model.blocks:
            q, k, v = block.project(rms_norm(x, block.attention_norm), cos, sin)  # [B, L, H or G, D]
            k, v = (y.repeat_interleave(config.heads // config.kv_heads, dim=2) for y in (k, v))
            out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), attn_mask=seen)
            x = x + block.attention_out(out.transpose(1, 2).flatten(2))
            x = x + block.feed_forward(rms_norm(x, block.ffn_norm))
        hidden = rms_norm(x, self.model.norm)
        if config.pooling == "last":
            last = (torch.arange(ids.shape[1]) * mask).amax(1)[:, None, None].expand(-1, 1, hidden.shape[2])
            pooled = hidden.gather(1, last)[:, 0] * own.any(1)[:, None]
        else:
            pooled = (hidden * mask[:, :, None]).sum(1)  # not divided by the length, since the next line normalises
        return F.normalize(pooled, dim=-1)


def write(folder: Path, run: str | Path, encoder: Encoder, dtype: str) -> None:
    """Write model.onnx (inputs input_ids and attention_mask, output sentence_embedding) and the tokenizer into
    `folder`, which exists.
    """
    model = Padded(encoder.model.cpu()).eval()
    example = torch.arange(10).view(2, 5), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it lists the optional packages that it does without
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            model,
            example,
            folder / "model.onnx",
            input_names=["input_ids", "attention_mask"],
            output_names=["sentence_embedding"],
            dynamic_shapes=(sizes, sizes),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            external_data=sum(p.nbytes for p in model.parameters()) > INLINE,
        )
    write_tokenizer(folder, encoder)
