"""Stage 4: pairs with mined hard negatives, and scored pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from conan_engine.errors import UserError
from conan_engine.evaluation.encoder import embed_sequences
from conan_engine.model import losses
from conan_engine.negatives import distilling, mining
from conan_engine.negatives.pools import Pools
from conan_engine.stages.contrastive import Contrastive, embed_and_backward
from conan_engine.stages.packed import Packed, concatenate, nothing, packed, sizes
from conan_engine.stages.stage import tokenizer_of

if TYPE_CHECKING:
    from torch import Tensor

    from conan_engine.config import Config
    from conan_engine.data.loader import Batch
    from conan_engine.data.shards import Shards
    from conan_engine.model.transformer import Transformer
    from conan_engine.parallel.mesh import Group, Mesh


class Supervised(Contrastive):
    """Stage 4: InfoNCE with mined hard negatives and CoSENT on scored pairs, over all Matryoshka dims, bidirectional.

    L = L_InfoNCE + beta * L_CoSENT, with both in the same step. With supervised.distil, + distil_weight * L_distil: the
    scores that a teacher gives to a query's positive and its hard negatives.

    Cross-GPU batch balance (arXiv 2408.15710, section 3.3): every rank brings its own queries, positives and hard
    negatives, and the documents of all ranks are negatives, so their number grows with the ranks. A source may ask for
    fewer hard negatives, or for its own hard negatives alone.
    """

    def __init__(self, config: Config, shards: dict[str, Shards], sts_shards: dict[str, Shards], group: Group) -> None:
        super().__init__("supervised", config, shards, group)
        self.shards = shards
        self.pools = {}
        self.corpora = {}
        self.rules = {}
        self.mined = Path(config.out_dir, "negatives")
        for name, about in self.settings.data.items():
            self.rules[name] = dataclasses.replace(config.negatives, count=about.count(config.negatives))
            if self.rules[name].count:
                self.corpora[name] = mining.Corpus(shards[name], self.known[name])
                self.rules[name] = self._fitted(name, about)
        self.add_loader("data", shards, self.settings.data, "batch", kind="pairs", shape="records")
        if self.settings.sts:
            self.add_loader("sts", sts_shards, self.settings.sts, "sts_batch", kind="sts", shape="records")

    def _fitted(self, name, about):
        wanted, corpus = self.rules[name], self.corpora[name]
        rule = mining.fitted(wanted, corpus)
        if rule.count < wanted.count:
            if not (rule.count or about.in_batch_negatives):
                raise UserError(
                    f"{name}: all its queries have the same answer, and in_batch_negatives is false, so it has no "
                    "negatives; leave it out, or set in_batch_negatives = true"
                )
            if self.group.rank == 0:
                print(
                    f"{name}: {len(corpus)} different answers, so {rule.count or 'no'} hard "
                    f"negative{'s' * (rule.count != 1)} per query instead of {wanted.count}",
                    flush=True,
                )
        return rule

    def mine(self, model: Transformer, mesh: Mesh) -> None:
        """Mine the pools of the queries that this stage will draw, or load them if this model has mined them before.

        All ranks take part; the only collectives are those of one copy of the model.
        """
        weights = mining.digest(model, mesh.tensor)
        for name, shards in self.shards.items():
            rule = self.rules[name]
            if not rule.count:
                continue

            def embed(records, fields, shards=shards):
                return embed_sequences(model, *shards.gather(records, fields))

            corpus, queries = self.corpora[name], self.queries_of(name)
            folder = self.mined / mining.key(rule, shards.fingerprint, weights, queries, self.config.seed)
            mining.Mining(corpus, self.known[name], queries, rule, self.config.seed, name, folder, mesh).run(embed)
            self.pools[name] = Pools.mapped(corpus, queries, rule, folder)

    def teach(self, mesh: Mesh) -> None:
        tokenizer = self.settings.distil and tokenizer_of(self.config)
        taught = [name for name in self.pools if self.settings.distil and self.settings.data[name].distil]
        for name in taught:
            self.pools[name].targets = distilling.Targets(
                self.pools[name], self.settings.teacher, tokenizer, name, mesh
            ).make()
        if (
            self.settings.distil
            and not self.settings.teacher
            and all(np.isnan(self.pools[name].targets[:, 0]).all() for name in taught)
        ):
            raise UserError(
                "supervised.distil: no record has scores (pos_scores, neg_scores), and supervised.teacher is empty; "
                "set supervised.teacher, or leave distil out"
            )

    def queries_of(self, name: str) -> np.ndarray:
        """The records of a source that the stage will draw as queries."""
        return self.loaders["data"].drawn_from(name, self.settings.steps)

    def attention(self, step: int) -> tuple[float, str]:
        return 1.0, "column"

    def draw(self) -> tuple[Batch, Batch | None]:
        return super().draw(), self.loaders["sts"].next() if "sts" in self.loaders else None

    def backward(
        self, model: Transformer, batch: Any, step: int, before_last: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        batch, sts = batch
        if sts and self.settings.balance == "alternating":
            batch, sts = (nothing(batch), sts) if step % 2 else (batch, None)
        settings, pools, n = self.settings, self.pools.get(batch.source), len(batch.records)
        hard, hard_group = self._hard_negatives(batch)
        everything = concatenate(packed(batch), hard, *([packed(sts)] if sts else []))
        groups = batch.groups.to(self.group.device)
        document_group = torch.cat((groups, hard_group))
        in_batch = settings.data[batch.source].in_batch_negatives
        known = self.known_in(batch, document_group) if in_batch else None
        targets = torch.from_numpy(pools.targets_of(batch.records)) if pools and pools.targets is not None else None

        def loss_of(embeddings):
            m = len(document_group)
            queries, documents, pairs = embeddings.split((n, m, len(embeddings) - n - m))
            own = documents[:n], documents[n:].view(n, self.rules[batch.source].count, documents.shape[1])
            if in_batch:
                loss, accuracy = self.info_nce(queries, documents, groups, document_group, known)
            else:
                loss, accuracy = losses.info_nce_of_own(
                    queries, *own, settings.temperature, self.group, settings.dims, losses.margin_of(settings)
                )
            similar = taught = 0.0 * loss
            if sts:
                scores = sts.scores.to(self.group.device)
                similar = losses.cosent(*pairs.chunk(2), scores, settings.sts_temperature, self.group, settings.dims)
            if targets is not None:
                taught = losses.distil(
                    queries, torch.cat((own[0][:, None], own[1]), dim=1), targets, settings.distil,
                    settings.temperature, settings.distil_temperature, self.group, settings.dims,
                )  # fmt: skip
            total = loss + settings.beta * similar + settings.distil_weight * taught
            cosines = F.cosine_similarity(queries[:, None], own[1], dim=-1)  # [n, K]
            return total, accuracy, loss.detach(), similar.detach(), taught.detach(), cosines.detach()

        total, accuracy, loss, similar, taught, cosines = embed_and_backward(
            model, everything, settings, *self.attention(step), loss_of, before_last
        )
        if pools:
            counts = self.group.counts(n)
            everyones = self.group.gather(torch.from_numpy(batch.records).to(self.group.device), counts)
            pools.update(everyones.cpu().numpy(), self.group.gather(cosines.float(), counts).cpu().numpy())
        return {
            "loss": self.group.sum(total).item(),
            "info_nce": self.group.sum(loss).item(),
            "cosent": self.group.sum(similar).item(),
            **({"distil": self.group.sum(taught).item()} if settings.distil else {}),
            "accuracy": self.group.sum(accuracy).item(),
            "replaced": sum(p.replaced for p in self.pools.values()),
            "source": batch.source,
            **sizes(everything, self.group, both_ways=True),
        }

    def _hard_negatives(self, batch: Batch) -> tuple[Packed, Tensor]:
        """The hard negatives of a batch's queries, K for each, and their groups, int64 [n * K]."""
        pools, device = self.pools.get(batch.source), self.group.device
        # They are drawn now, not ahead of time: the step before may have replaced some.
        records, fields, groups = pools.draw(batch.records) if pools else np.empty((3, 0), np.int64)
        found = self.shards[batch.source].gather(records, fields, self.settings.max_tokens)
        return Packed(*(torch.from_numpy(x).to(device) for x in found)), torch.from_numpy(groups).to(device)

    def state(self) -> dict[str, np.ndarray]:
        return super().state() | {
            f"pool/{name}/{key}": value for name, pools in self.pools.items() for key, value in pools.state().items()
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        super().load_state(state)
        for name in self.shards:
            if not self.rules[name].count:
                continue
            own = {
                key.removeprefix(f"pool/{name}/"): value
                for key, value in state.items()
                if key.startswith(f"pool/{name}/")
            }
            folder = self.mined / own["folder"].tobytes().decode()
            self.pools[name] = Pools.mapped(self.corpora[name], self.queries_of(name), self.rules[name], folder)
            self.pools[name].load_state(own)
