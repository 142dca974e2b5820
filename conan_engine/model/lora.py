"""LoRA (arXiv 2106.09685): frozen weights with trained adapters beside them.

Beside a matrix W stand two narrow ones, A [rank, inputs] and B [outputs, rank]: y = x W' + (alpha / rank) x A' B'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from conan_engine.parallel.tensor_parallel import Split

if TYPE_CHECKING:
    from torch import Tensor

    from conan_engine.config import Lora
    from conan_engine.model.transformer import Transformer
    from conan_engine.parallel.mesh import Group


class Adapted(nn.Module):
    """A linear layer of tensor_parallel.py with its weight frozen and an adapter beside it.

    If the layer is cut by columns, `up` is cut alike and every rank has all of `down`; if it is cut by rows, the
    reverse. So the ranks' results are summands wherever they were summands before.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, group: Group) -> None:
        super().__init__()
        self.weight, self.scale = linear.weight, alpha / rank
        split, (outputs, inputs) = linear.weight.split_by, linear.weight.shape
        self.down = nn.Parameter(linear.weight.new_empty(rank, inputs))
        self.up = nn.Parameter(linear.weight.new_zeros(outputs, rank))
        if split.dim == 0:
            self.up.split_by = split
        else:
            self.down.split_by = Split(1, split.sections)
        self.group = group

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw A as torch draws a linear layer, with the same numbers for any number of ranks; set B to zero, which
        changes nothing at first.
        """
        split = getattr(self.down, "split_by", None)
        whole = self.down.new_empty(len(self.down), split.sections[0] if split else self.down.shape[1])
        nn.init.kaiming_uniform_(whole, 5**0.5, generator=generator)
        self.down.data.copy_(split.cut(whole, self.group) if split else whole)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.scale * F.linear(F.linear(x, self.down), self.up)

    def merged(self) -> Tensor:
        """The weight that does the same without the adapter."""
        return self.weight + self.scale * self.up @ self.down


def adapt(model: Transformer, settings: Lora, seed: int) -> None:
    """Freeze a model's weights and add the adapters of `settings` (config.Lora), drawn by the seed."""
    generator = torch.Generator(model.embedding.device).manual_seed(seed)
    for adapted in attach(model, settings):
        adapted.init_weights(generator)


def attach(model: Transformer, settings: Lora) -> list[Adapted]:
    """Freeze a model's weights and add adapters whose numbers are not drawn yet; returns these, in order."""
    for p in model.parameters():
        p.requires_grad_(False)
    every = []
    for block in model.blocks:
        for name in settings.targets:
            every.append(Adapted(getattr(block, name), settings.rank, settings.alpha, model.tensor.group))
            setattr(block, name, every[-1])
    return every


@torch.no_grad()
def merge(model: Transformer) -> None:
    """Turn adapted layers back into plain ones whose weights include the adapters."""
    for block in model.blocks:
        for name, layer in list(block.named_children()):
            if isinstance(layer, Adapted):
                outputs, inputs = layer.weight.shape
                linear = nn.Linear(inputs, outputs, bias=False, device="meta")
                split = layer.weight.split_by
                linear.weight = nn.Parameter(layer.merged())
                linear.weight.split_by = split
                setattr(block, name, linear)
    for p in model.parameters():
        p.requires_grad_(True)
