"""Stages 1 and 2: predict the next token."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from conan_engine.model.transformer import positions
from conan_engine.stages.packed import Packed, packed, sizes
from conan_engine.stages.stage import Stage, tokenizer_of

if TYPE_CHECKING:
    from torch import Tensor

    from conan_engine.config import Config
    from conan_engine.data.loader import Batch
    from conan_engine.data.shards import Shards
    from conan_engine.model.transformer import Transformer
    from conan_engine.parallel.mesh import Group


class LanguageModelling(Stage):
    """Stages 1 and 2: predict the next token, causal; of the whole text (pretrain) or of the answers alone (sft).

    With pretrain.masked: predict masked tokens, bidirectional (masked next token, LLM2Vec, arXiv 2404.05961).
    """

    def __init__(self, name: str, config: Config, shards: dict[str, Shards], group: Group) -> None:
        super().__init__(name, config, group)
        self.masked = config.pretrain.masked if name == "pretrain" else 0.0
        if self.masked:  # a model trained on the next token has no mask token: LLM2Vec takes "_"
            self.mask_token = tokenizer_of(config).encode("_")[-1]
        self.add_loader(
            "data",
            shards,
            self.settings.data,
            "batch",
            kind="text" if name == "pretrain" else "instruction",
            shape="rows",
        )

    def attention(self, step: int) -> tuple[float, str]:
        return 0.0, "column"  # for validation, whose loss is that of the next token, with and without masked

    def backward(
        self, model: Transformer, batch: Batch, step: int, before_last: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        sequences, targets, alpha = packed(batch), batch.targets.long(), 0.0
        if self.masked:
            alpha = 1.0
            hidden = chosen(sequences, self.masked, self.config.seed + step)
            sequences, targets = hide(sequences, targets, hidden, self.mask_token)
        counted = self.group.sum((targets != -100).sum())
        loss: Any = 0.0
        start = 0
        parts, order = sequences.cut(self.settings, batch.rows)
        if order is not None:
            targets = sequences._replace(tokens=targets).taken(order).tokens
        for part in parts:
            summed = model.next_token_loss(
                part.tokens, part.cu_seqlens, targets[start : start + len(part.tokens)], alpha
            )
            if part is parts[-1]:
                before_last()
            (summed / counted).backward()
            loss, start = loss + summed.detach(), start + len(part.tokens)
        return {
            "loss": (self.group.sum(loss) / counted).item(),
            "source": batch.source,
            **sizes(sequences, self.group, alpha > 0, counted),
        }


def chosen(sequences: Packed, share: float, seed: int) -> Tensor:
    """Choose a share of a batch's tokens by a hash of token, position and seed: bool [T]. The choice does not depend on
    the rank.
    """
    x = (
        sequences.tokens.long() * 0x9E3779B1
        + positions(sequences.cu_seqlens, len(sequences.tokens)) * 0x85EBCA77
        + seed * 0xC2B2AE3D
    )
    for _ in range(2):  # overflow is harmless: this is a hash
        x = (x ^ ((x >> 15) & 0x1FFFF)) * 0x2C1B3C6D & 0xFFFFFFFF
    return (x ^ (x >> 15)) & 0xFFFFFF < share * 2**24


def hide(sequences: Packed, targets: Tensor, hidden: Tensor, token: int) -> tuple[Packed, Tensor]:
    """Replace the tokens at `hidden`, bool [T], by `token`, and keep only the targets of the tokens before them.

    Returns (Packed, targets int64 [T]).
    """
    next_hidden = hidden.roll(-1)
    ends = sequences.cu_seqlens[1:].long() - 1
    next_hidden[ends[ends >= 0]] = False  # the token after a sequence's last one belongs to another sequence
    return sequences._replace(tokens=sequences.tokens.masked_fill(hidden, token)), targets.masked_fill(
        ~next_hidden, -100
    )
