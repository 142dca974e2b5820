"""Stage 3: pairs, while the soft mask opens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conan_engine.errors import UserError
from conan_engine.model import losses
from conan_engine.negatives import distilling
from conan_engine.stages.contrastive import Contrastive, embed_and_backward
from conan_engine.stages.packed import concatenate, packed, sizes
from conan_engine.stages.stage import tokenizer_of

if TYPE_CHECKING:
    from conan_engine.config import Config
    from conan_engine.data.loader import Batch
    from conan_engine.data.shards import Shards
    from conan_engine.model.transformer import Transformer
    from conan_engine.parallel.mesh import Group, Mesh


ALPHA = {  # alpha, how far the soft mask is open, at progress t / tau in [0, 1] (arXiv 2509.12892, section 3.2)
    "linear": lambda progress: progress,
    "accelerating": lambda progress: progress**2,
    "decelerating": lambda progress: 1 - (1 - progress) ** 2,
    "open": lambda progress: 1.0,  # bidirectional from the first step
    "closed": lambda progress: 0.0,  # causal to the last step
}


class Weak(Contrastive):
    """Stage 3: InfoNCE with in-batch negatives, while the soft mask opens from causal to bidirectional.

    With weak.distil, texts without pairs learn a teacher's vectors: L = L_InfoNCE + distil_weight * L_cosine.
    """

    def __init__(
        self, config: Config, shards: dict[str, Shards], texts_shards: dict[str, Shards], group: Group
    ) -> None:
        super().__init__("weak", config, shards, group)
        key, shape = ("batch_tokens", "tokens") if self.settings.batch_tokens else ("batch", "records")
        self.add_loader("data", shards, self.settings.data, key, kind="pairs", shape=shape)
        self.texts_shards, self.targets = texts_shards, {}
        if texts_shards:
            self.add_loader(
                "texts", texts_shards, self.settings.texts, "texts_batch", kind="pairs", shape="records", fields=1
            )

    def teach(self, mesh: Mesh) -> None:
        tokenizer = self.settings.distil and tokenizer_of(self.config)
        for name, shards in self.texts_shards.items():
            records = self.loaders["texts"].drawn_from(name, self.settings.steps)
            asked = distilling.Texts(
                shards, records, self.settings.distil_teacher or self.settings.teacher, tokenizer, name, mesh
            )
            self.targets[name] = asked.make(Path(self.config.out_dir, "texts"))
            if asked.width > self.config.model.width:
                raise UserError(
                    f"{distilling.VECTORS}: the teacher's vectors have {asked.width} numbers, the model's have "
                    f"{self.config.model.width}; raise model.width, or name a smaller teacher"
                )

    def attention(self, step: int) -> tuple[float, str]:
        return ALPHA[self.settings.alpha](step / max(1, self.settings.steps - 1)), self.settings.mask

    def draw(self) -> tuple[Batch, Batch | None]:
        return super().draw(), self.loaders["texts"].next() if self.texts_shards else None

    def backward(
        self, model: Transformer, batch: Any, step: int, before_last: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        batch, texts = batch
        groups, settings = batch.groups.to(self.group.device), self.settings
        sequences = concatenate(packed(batch), packed(texts)) if texts else packed(batch)
        known = self.known_in(batch, groups)
        alpha, mask = self.attention(step)

        def loss_of(embeddings):
            pairs, alone = embeddings.split((2 * len(groups), len(embeddings) - 2 * len(groups)))
            loss, accuracy = self.info_nce(*pairs.chunk(2), groups, groups, known)
            if not texts:
                return loss, accuracy
            targets = torch.from_numpy(self.targets[texts.source].of(texts.records)).to(alone.device)
            taught = losses.toward(alone, targets, self.group)
            return loss + settings.distil_weight * taught, accuracy, loss.detach(), taught.detach()

        total, accuracy, *parts = embed_and_backward(model, sequences, settings, alpha, mask, loss_of, before_last)
        return {
            "loss": self.group.sum(total).item(),
            **{name: self.group.sum(part).item() for name, part in zip(("info_nce", "distil"), parts)},
            "accuracy": self.group.sum(accuracy).item(),
            "alpha": alpha,
            "source": batch.source,
            **sizes(sequences, self.group, alpha > 0),
        }
