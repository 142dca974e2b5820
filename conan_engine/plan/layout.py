"""The parameters of a stage's model as its ranks hold them, without allocating any."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from conan_engine.model import lora
from conan_engine.model.transformer import Transformer
from conan_engine.parallel.mesh import Group
from conan_engine.parallel.sharded_adamw import in_buckets

if TYPE_CHECKING:
    from conan_engine.config import Config


class Layout:
    """What one of `tensor` ranks that share a model holds: numbers of parameters.

    whole: of all ranks together; parameters: of one; trained: those with gradients; matrices: those of the blocks;
    table: of the token table, which has so many `rows`. Of each of the optimizer's buckets: buckets, its parameters;
    halves, what these are of: 2 n for the attention of block n, 2 n + 1 for its FFN, -1 for neither; cut, whether each
    tensor rank has a part of its own.
    """

    def __init__(self, config: Config, name: str, vocab_size: int, tensor: int = 1) -> None:
        with torch.device("meta"):
            model = Transformer(config.model, vocab_size, "bfloat16", Group("meta", 0, tensor))
            if name in ("weak", "supervised"):
                model.lm_head = None
            if config.lora.rank:
                lora.attach(model, config.lora)
        self.model, self.shape = model, config.model
        self.whole = tensor * sum(p.numel() for p in model.parameters() if hasattr(p, "split_by")) + sum(
            p.numel() for p in model.parameters() if not hasattr(p, "split_by")
        )
        self.parameters = sum(p.numel() for p in model.parameters())
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
        self.table, self.rows = model.embedding.numel(), len(model.embedding)
        self.table_trained = model.embedding.requires_grad
        found = in_buckets(model)
        self.buckets = [sum(p.numel() for _, p in bucket) for bucket in found]
        self.halves = [sorted({_half_of(key) for key, _ in bucket}) for bucket in found]
        self.cut = [hasattr(bucket[0][1], "split_by") for bucket in found]


def _half_of(name):
    if not name.startswith("blocks."):
        return -1
    _, block, layer, *_ = name.split(".")
    return 2 * int(block) + (layer in ("ffn_norm", "gate_up", "ffn_out"))
