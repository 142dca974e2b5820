"""Start from a language model whose hidden states crowd into few directions: spread them.

A few directions hold most of the length of a language model's hidden states, so the mean over a text's tokens is nearly
the same for all texts (arXiv 1909.00512). Whitening evens the directions out (for sentence vectors: arXiv 2103.15316).
Here the weights hold it, so the model stays an ordinary Llama: the axes of the residual stream become the principal
axes of the last hidden states, the strongest first, and the last norm divides each by a power of its size. The first
numbers of a vector, which Matryoshka dims keep, then hold what varies most.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from conan_engine.model import initial

if TYPE_CHECKING:
    from torch import Tensor

    from conan_engine.data.shards import Shards
    from conan_engine.model.transformer import Transformer
    from conan_engine.parallel.mesh import Group, Mesh


RECORDS, TOKENS = 400, 128  # records of each source, and tokens of each of their texts, that are read
AT_ONCE = 50  # records of a forward pass
FLOOR = 1e-3  # a direction that holds less than this share of the mean counts as one that holds it


@torch.no_grad()
def start(model: Transformer, shards: Iterable[Shards], vocab_size: int, exponent: float, mesh: Mesh) -> None:
    """Whiten the last hidden states of `model`, over a sample of what it will be trained on.

    exponent: of the mean squares by which the directions are divided; 0.5 makes all alike, 0 leaves them as they are.
    """
    model.norm.fill_(1)
    squares, axes = torch.linalg.eigh(moments(model, list(shards), vocab_size, mesh.data).cpu())
    # the same bits on every rank: another machine's eigenvectors may have other signs
    found = torch.cat((squares[None], axes)).flip(1).to(mesh.device)
    squares, axes = mesh.sum(found if mesh.rank == 0 else torch.zeros_like(found)).tensor_split([1])
    turn(model, axes)
    squares = squares[0].clamp(min=FLOOR * squares.mean())
    scale = squares**-exponent
    model.norm.copy_(scale / (squares * scale**2).mean().sqrt())  # the states keep a root mean square of 1


def moments(model: Transformer, shards: list[Shards], vocab_size: int, data: Group) -> Tensor:
    """The second moments of the last hidden states over a sample of texts, causal: float64 [C, C].

    Each token counts by its rarity: otherwise a few frequent ones decide.
    """
    width, device = model.config.width, model.embedding.device
    weights = torch.ones(model.config.vocab_size or vocab_size, device=device)
    weights[:vocab_size] = initial.rarity(shards, vocab_size).to(device)
    total = torch.zeros(width + 1, width, dtype=torch.float64, device=device)  # the last row counts tokens
    for tokens, cu_seqlens in sample(shards, data.rank, data.world):
        tokens, cu_seqlens = torch.from_numpy(tokens).to(device), torch.from_numpy(cu_seqlens).to(device)
        hidden = model(tokens, cu_seqlens).float()
        of_tokens = weights[tokens[model.tensor.mine(len(tokens))].long()]
        total[:-1] += (hidden * of_tokens[:, None]).T @ hidden
        total[-1] += of_tokens.sum()
    total = data.sum(model.tensor.sum(total))
    return total[:-1] / total[-1]


def sample(shards: list[Shards], rank: int, world: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This rank's forward passes over the sample: tokens int32 [T], cu_seqlens int32 [B+1]."""
    for source in shards:
        chance = np.random.default_rng(0)
        chosen = np.sort(chance.choice(len(source), min(RECORDS, len(source)), replace=False))
        for first in range(rank * AT_ONCE, len(chosen), world * AT_ONCE):
            tokens, cu_seqlens = source.gather_records(chosen[first : first + AT_ONCE], TOKENS)
            if len(tokens):
                yield tokens, cu_seqlens


def turn(model: Transformer, axes: Tensor) -> None:
    """Turn the residual stream to other axes, the columns of `axes` float64 [C, C], which is orthogonal.

    The vectors of texts turn along, where the last norm weighs all axes alike. The norms of the blocks go into the
    matrices that read them, since RMSNorm has a weight for each old axis.
    """
    model.embedding.copy_(model.embedding.double() @ axes)
    for block in model.blocks:
        for norm, reader, writer in (
            (block.attention_norm, block.qkv, block.attention_out),
            (block.ffn_norm, block.gate_up, block.ffn_out),
        ):
            reader.weight.copy_((reader.weight * norm).double() @ axes)
            writer.weight.copy_(axes.T @ writer.weight.double())
            norm.fill_(1)
