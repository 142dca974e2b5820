"""What the stages of pairs share: the loss of a batch whose known positives are no negatives, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

import conan_kernels
from conan_engine.data import known as known_positives
from conan_engine.model import losses
from conan_engine.stages.packed import Packed
from conan_engine.stages.stage import Stage

if TYPE_CHECKING:
    from torch import Tensor

    from conan_engine.config import Config
    from conan_engine.config import Stage as StageSettings
    from conan_engine.data.loader import Batch
    from conan_engine.data.shards import Shards
    from conan_engine.model.transformer import Transformer
    from conan_engine.parallel.mesh import Group
    from conan_kernels import Known


class Contrastive(Stage):
    """What the stages of pairs share: which documents are known to be right for which query."""

    def __init__(self, name: str, config: Config, shards: dict[str, Shards], group: Group) -> None:
        super().__init__(name, config, group)
        self.known = {source: known_positives.of(s) for source, s in shards.items()}

    def known_in(self, batch: Batch, document_group: Tensor) -> Known | None:
        """The known positives of this rank's queries among the documents of all ranks, or None. A collective.

        document_group: int64 [m], the groups of this rank's documents.
        """
        of_source = self.known[batch.source]
        if not len(of_source.records):
            return None
        everyones = self.group.gather(document_group, self.group.counts(len(document_group)))
        found = of_source.among(batch.records, everyones.cpu().numpy())
        return found and conan_kernels.Known(*(torch.from_numpy(x).to(self.group.device) for x in found))

    def info_nce(
        self, queries: Tensor, documents: Tensor, query_group: Tensor, document_group: Tensor, known: Known | None
    ) -> tuple[Tensor, Tensor]:
        """losses.info_nce of this rank's queries and documents, as the stage's settings say: (loss, accuracy)."""
        settings = self.settings
        return losses.info_nce(
            queries, documents, query_group, document_group, settings.temperature, self.group, settings.dims or None,
            known, losses.margin_of(settings), settings.symmetric, settings.same_side,
        )  # fmt: skip


def embed_and_backward(
    model: Transformer,
    packed: Packed,
    settings: StageSettings,
    alpha: float,
    mask: str,
    loss_of: Callable,
    before_last: Callable[[], None],
) -> tuple:
    """Embed the sequences, compute the loss of all embeddings, and backpropagate.

    Returns what loss_of(embeddings) gave, detached. before_last() is called before the last backward pass of the
    weights.

    With settings.chunk or chunk_tokens, at most that much is in a graph at a time (gradient caching, arXiv 2101.06983):
    embed all pieces; compute the gradient of the loss for each embedding; embed again, piece by piece, and pass each
    piece its gradients. The last piece's graph is kept from the first time.
    """
    parts, order = packed.cut(settings)
    *others, last = parts

    def embed(part):
        return model.embed(part.tokens, part.cu_seqlens, alpha, mask)

    with torch.no_grad():
        early = [embed(part) for part in others]
    kept = embed(last)
    embeddings = torch.cat([*early, kept.detach()]).requires_grad_()
    loss, *rest = loss_of(embeddings if order is None else embeddings[order.argsort()])
    loss.backward()
    *gradients, of_kept = embeddings.grad.split([len(part.cu_seqlens) - 1 for part in parts])
    if not others:
        before_last()
    kept.backward(of_kept)
    for part, gradient in zip(others, gradients):
        if part is others[-1]:
            before_last()
        embed(part).backward(gradient)
    return loss.detach(), *rest
