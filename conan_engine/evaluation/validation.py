"""Score held-out records during training: the stage's loss, search among the set's own documents, similarity of
pairs.

The records are the same every time, for any number of ranks, and no random number is drawn. Every rank embeds; only
rank 0 gets the numbers.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import conan_kernels
from conan_engine.data import known as known_positives
from conan_engine.data.known import ranges
from conan_engine.data.shards import order
from conan_engine.evaluation.encoder import embed_sequences, passes, pick, truncate
from conan_engine.evaluation.metrics import search, spearman
from conan_engine.model import losses

if TYPE_CHECKING:
    from conan_engine.config import Config, Stage, Supervised, Weak
    from conan_engine.data.shards import Shards
    from conan_engine.model.transformer import Transformer
    from conan_engine.parallel.mesh import Group, Mesh


class Validation:
    """The validation of one stage. `metric`: the number that chooses the best checkpoint."""

    def __init__(self, name: str, config: Config, shards: dict[str, Shards], mesh: Mesh) -> None:
        """shards: {source: Shards} of the validation's sources that the stage can use, including "sts" sources."""
        self.settings, self.mesh = config.validation, mesh
        self.weights = {source: config.validation.data[source].weight for source in shards}
        self.sets = {
            source: _OF_KIND[s.kind](s, _some(len(s), config.validation.records), getattr(config, name), config)
            for source, s in shards.items()
        }
        offered = {metric for one in self.sets.values() for metric in one.metrics}
        self.metric = next(metric for metric in (config.validation.metric, "loss", "spearman") if metric in offered)

    def due(self, step: int, steps: int) -> bool:
        return (step + 1) % self.settings.every == 0 or step + 1 == steps

    def measure(self, model: Transformer, alpha: float, mask: str) -> dict[str, float]:
        """{"validation/loss": ...} on rank 0, {} elsewhere. A collective.

        Each number is the weighted mean over the sources that give it; with several, each source's number is there too.
        alpha, mask: the attention of this step.
        """
        started = time.perf_counter()
        with torch.no_grad():
            found = {source: one.measure(model, alpha, mask, self.mesh.data) for source, one in self.sets.items()}
        if self.mesh.rank:
            return {}
        row = {}
        for key in dict.fromkeys(key for numbers in found.values() for key in numbers):
            having = {source: numbers[key] for source, numbers in found.items() if key in numbers}
            row[f"validation/{key}"] = float(
                np.average(list(having.values()), weights=[self.weights[source] for source in having])
            )
            row |= {f"validation/{source}/{key}": value for source, value in having.items() if len(having) > 1}
        return {**row, "validation/seconds": time.perf_counter() - started}

    def is_best(self, row: dict[str, Any], step: int, counters: dict[str, Any]) -> bool:
        """Whether the weights after `step` are the best of the stage so far; counters["best"] then holds them. A
        collective.
        """
        best, value = counters.get("best"), row.get(f"validation/{self.metric}", math.nan)
        better = (
            best is None
            or best["metric"] != self.metric
            or (value < best["value"] if self.metric == "loss" else value > best["value"])
        )
        if not self.mesh.any(self.mesh.rank == 0 and math.isfinite(value) and better):
            return False
        counters["best"] = {"step": step + 1, "metric": self.metric, "value": value}
        return True


class Texts:
    """For pretrain and sft: the mean loss of the learned tokens in the first max_tokens of each record."""

    metrics = ("loss",)

    def __init__(self, shards: Shards, records: np.ndarray, settings: Stage, config: Config) -> None:
        counts = shards.field_counts(records).astype(np.int64)
        record, field = ranges(np.zeros(len(records), np.int64), counts)
        tokens, bounds = shards.gather(records[record], field)
        edges = np.concatenate(([0], np.cumsum(counts)))
        starts = bounds[edges[:-1]]
        ends = np.minimum(bounds[edges[1:]], starts + settings.max_tokens)
        # a token is predicted from the one before; of an instruction, the output counts, and further answers
        answers = (field >= 2) & (field % 2 == 0) if shards.kind == "instruction" else np.ones(len(field), bool)
        begin, end = (
            np.clip(edge[answers], (starts + 1)[record[answers]], np.maximum(starts + 1, ends)[record[answers]])
            for edge in (bounds[:-1], bounds[1:])
        )
        _, learnt = ranges(begin, end)
        targets = np.full(len(tokens), -100, np.int64)
        targets[learnt - 1] = tokens[learnt]
        _, kept = ranges(starts, ends)
        self.tokens, self.targets = tokens[kept], targets[kept]
        self.cu_seqlens = np.concatenate(([0], np.cumsum(ends - starts))).astype(np.int32)

    def measure(self, model: Transformer, alpha: float, mask: str, group: Group) -> dict[str, float]:
        shared = passes(self.cu_seqlens)
        device = model.embedding.device
        # each record on one rank, so the total does not depend on the number of ranks
        summed = torch.zeros(len(shared), dtype=torch.float64, device=device)
        for i in range(group.rank, len(shared), group.world):
            tokens, cu_seqlens = pick(self.tokens, self.cu_seqlens, shared[i], device)
            targets, _ = pick(self.targets, self.cu_seqlens, shared[i], device)
            summed[i] = model.next_token_loss(tokens, cu_seqlens, targets, alpha, mask)
        return {"loss": float(group.sum(summed).sum()) / max(1, int((self.targets != -100).sum()))}


class Pairs:
    """For weak and supervised: InfoNCE with the batch's other positives as negatives, and search.

    Each distinct query searches among all positives and given negatives of these records.
    """

    metrics = ("loss", "ndcg@10", "recall@20")

    def __init__(self, shards: Shards, records: np.ndarray, settings: Weak | Supervised, config: Config) -> None:
        self.settings, self.dims = settings, _prefixes(config)
        self.known, self.records, self.groups = known_positives.of(shards), records, shards.groups(records)
        given = np.maximum(shards.field_counts(np.arange(len(shards))) - 2, 0).astype(np.int64)
        i, field = ranges(np.full(len(records), 2), 2 + given[records])
        flat = np.concatenate(([0], np.cumsum(given)))[records[i]] + field - 2
        record, field = np.concatenate((records, records[i])), np.concatenate((np.ones(len(records), np.int64), field))
        group = np.concatenate((self.groups, self.known.negatives[flat]))
        # equal documents count as one
        text, first = np.unique(shards.hashes(record, field), return_index=True)
        # each record's positive, as a number among the documents
        self.positive = np.searchsorted(text, shards.hashes(records, 1))
        queries = shards.hashes(records, 0)
        self.asked = np.sort(np.unique(queries, return_index=True)[1])
        right = [np.isin(group[first], self.known.of(records[q], self.groups[q])) for q in self.asked]
        self.itself = queries[self.asked, None] == text  # the query's own text does not count as found
        self.right = np.stack(right) & ~self.itself
        self.tokens = shards.gather(
            np.concatenate((records, record[first])),
            np.concatenate((np.zeros(len(records), np.int64), field[first])),
            settings.max_tokens,
        )

    def measure(self, model: Transformer, alpha: float, mask: str, group: Group) -> dict[str, float]:
        vectors = embed_sequences(model, *self.tokens, group=group, alpha=alpha, mask=mask)
        if group.rank:
            return {}
        queries, documents = vectors[: len(self.records)], vectors[len(self.records) :]
        found = {"loss": self._loss(queries, documents, model.embedding.device)}
        for suffix, dim in self.dims.items():
            scores = truncate(queries[self.asked], dim) @ truncate(documents, dim).T
            found[f"ndcg@10{suffix}"], found[f"recall@20{suffix}"] = search(
                np.where(self.itself, -np.inf, scores), self.right
            )
        return found

    def _loss(self, queries, documents, device):
        size = min(self.settings.batch, len(self.records))
        found = []
        for start in range(0, len(self.records) - size + 1, size):
            rows = slice(start, start + size)
            known = self.known.among(self.records[rows], self.groups[rows])
            known = known and conan_kernels.Known(*(torch.from_numpy(x).to(device) for x in known))
            q, d, g = (
                torch.from_numpy(x).to(device)
                for x in (queries[rows], documents[self.positive[rows]], self.groups[rows])
            )
            dims = self.settings.dims or None
            found.append(
                conan_kernels.info_nce(
                    q,
                    d,
                    torch.arange(size, device=device),
                    self.settings.temperature,
                    dims,
                    query_group=g,
                    document_group=g,
                    known=known,
                    margin=losses.margin_of(self.settings),
                ).loss.item()
            )
        return float(np.mean(found))


class Scored:
    """For scored pairs: Spearman's correlation of the cosines with the scores."""

    metrics = ("spearman",)

    def __init__(self, shards: Shards, records: np.ndarray, settings: Supervised, config: Config) -> None:
        self.dims, self.scores = _prefixes(config), shards.scores(records)
        self.tokens = shards.gather(np.tile(records, 2), np.repeat([0, 1], len(records)), settings.max_tokens)

    def measure(self, model: Transformer, alpha: float, mask: str, group: Group) -> dict[str, float]:
        first, second = np.split(embed_sequences(model, *self.tokens, group=group, alpha=alpha, mask=mask), 2)
        cosines = {
            suffix: np.einsum("ne,ne->n", truncate(first, dim), truncate(second, dim))
            for suffix, dim in self.dims.items()
        }
        return {f"spearman{suffix}": spearman(cosine, self.scores) for suffix, cosine in cosines.items()}


_OF_KIND: dict[str, Any] = {"text": Texts, "instruction": Texts, "pairs": Pairs, "sts": Scored}


def _some(count, at_most):
    """The records to use: the first of a fixed permutation, so that they are not all neighbours in the file."""
    return order(0, 0, count, np.arange(min(count, at_most)))


def _prefixes(config):
    """{prefix of a metric's name: Matryoshka dim}."""
    width = config.model.width
    return {"": None, **{f"/{dim}": dim for dim in config.supervised.dims if dim < width}}
