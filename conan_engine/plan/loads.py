"""What a step of each stage gives a rank to compute: how many texts, tokens and pairs of tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from conan_engine.config import Config
    from conan_engine.plan.lengths import Lengths, Texts

FAR = 4.0  # standard deviations from the mean to the largest batch of a run


class Load(NamedTuple):
    """A step of one of the ranks that share out the data.

    It computes `tokens` in `texts` texts, in `parts` passes, of which the largest has `at_once` tokens. pairs: of
    tokens that attend to each other, `both_ways` or causal. learnt: tokens that the LM head predicts. queries and
    documents: vectors that the rank brings to InfoNCE, over so many `dims`.
    """

    tokens: float
    texts: float
    pairs: float
    learnt: float
    at_once: float
    parts: int
    both_ways: bool = True
    queries: int = 0
    documents: int = 0
    dims: int = 0

    def sizes(self, ranks: int) -> dict[str, float]:
        """What stages.packed.sizes counts in a step of all ranks."""
        return {"tokens": ranks * self.tokens, "pairs": ranks * self.pairs, "learnt": ranks * self.learnt}


def of(name: str, config: Config, ranks: int, lengths: Lengths) -> Load:
    """The Load of a step of the stage `name` on each of `ranks` ranks."""
    return (_of_rows if name in ("pretrain", "sft") else _of_pairs)(name, config, ranks, lengths)


def _of_rows(name, config, ranks, lengths):
    settings, texts = getattr(config, name), lengths[name]
    rows = max(1, settings.batch // ranks)
    tokens, in_part = rows * settings.max_tokens, min(rows, settings.chunk or rows)
    at_once, parts = in_part * settings.max_tokens, math.ceil(rows / in_part)
    if settings.chunk_tokens:
        at_once, parts = _budgeted(settings, tokens, tokens, [(tokens / texts.mean, texts)])
    masked = settings.masked if name == "pretrain" else 0.0
    squares = tokens * texts.square / texts.mean
    return Load(
        tokens=tokens,
        texts=tokens / texts.mean,
        pairs=squares if masked else (squares + tokens) / 2,
        learnt=tokens * (masked or texts.learnt),
        at_once=at_once,
        parts=parts,
        both_ways=masked > 0,
    )


def _of_pairs(name, config, ranks, lengths):
    settings, share = getattr(config, name), 1.0
    queries = max(1, settings.batch // ranks)
    hard, beside = 0, []
    if name == "supervised":
        hard = max((about.count(config.negatives) for about in settings.data.values()), default=config.negatives.count)
        if settings.sts:
            beside = [(2 * settings.sts_batch / ranks, lengths["sts"])]
            share = 0.5 if settings.balance == "alternating" else 1.0
    elif settings.texts:
        beside = [(settings.texts_batch / ranks, lengths["texts"])]
    batch_tokens = settings.batch_tokens / ranks if name == "weak" else 0
    if batch_tokens:
        queries = max(1, round(batch_tokens / (lengths["query", name].mean + lengths["document", name].mean)))
    groups = [(queries, lengths["query", name]), (queries * (1 + hard), lengths["document", name]), *beside]
    texts = sum(n for n, _ in groups)
    in_part = min(texts, settings.chunk or texts)
    tokens, most = sum(n * of.mean for n, of in groups), _largest(groups, in_part, settings.max_tokens, batch_tokens)
    at_once, parts = most, math.ceil(texts / in_part)
    if settings.chunk_tokens:
        at_once, parts = _budgeted(settings, tokens, most, groups)
    return Load(
        tokens=share * tokens,
        texts=share * texts,
        pairs=share * sum(n * of.square for n, of in groups),
        learnt=0,
        at_once=at_once,
        parts=parts,
        queries=queries,
        documents=queries * (1 + hard),
        dims=len(settings.dims) or 1,
    )


def _budgeted(settings, tokens: float, most: float, groups: list[tuple[float, Texts]]) -> tuple[float, int]:
    """(at_once, parts) with chunk_tokens. most: tokens of the largest batch that is to be expected."""
    budget = settings.chunk_tokens
    if most <= budget:
        return most, 1
    squares = sum(n * of.square for n, of in groups)
    # half a text of the length that a token is in has no more room in a part
    filled = max(budget - squares / tokens / 2, budget / 2)
    longest = max(_far(*of.longest) for _, of in groups)
    return min(most, max(budget, min(settings.max_tokens, longest))), math.ceil(tokens / filled)


def _far(mean, square):
    return mean + FAR * math.sqrt(max(0.0, square - mean**2))


def _largest(groups: list[tuple[float, Texts]], in_part: float, longest: int, batch_tokens: float) -> float:
    """Tokens of the largest part that is to be expected: parts hold consecutive texts, so one may hold only the longest
    kind of texts.
    """
    left, sum_of_means, variance, most = in_part, 0.0, 0.0, in_part * longest
    for count, (mean, square) in sorted(((n, of.longest) for n, of in groups), key=lambda group: -group[1][0]):
        n = min(count, left)
        left, sum_of_means, variance = left - n, sum_of_means + n * mean, variance + n * max(0.0, square - mean**2)
    if batch_tokens:
        return min(most, batch_tokens + sum(n for n, _ in groups[2:]) * longest)
    return min(most, sum_of_means + FAR * math.sqrt(variance))
