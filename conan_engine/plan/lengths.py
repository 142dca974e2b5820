"""How long the texts of a run are: as its settings say, or its token shards."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from conan_engine.config import Validation
from conan_engine.data import datasets
from conan_engine.data.shards import Shards
from conan_engine.data.tokenizer import Tokenizer
from conan_engine.errors import UserError

if TYPE_CHECKING:
    from conan_engine.config import Config

SAMPLE = 10_000  # records of a source whose lengths are read
PARTS = ("query", "document")


class Texts(NamedTuple):
    """Texts' tokens: their mean, the mean of their squares, and the share of the tokens to learn. A step reads one
    source: `of_longest` has both means of the source with the longest texts; None: there is one.
    """

    mean: float
    square: float
    learnt: float = 1.0
    of_longest: tuple[float, float] | None = None

    @property
    def longest(self) -> tuple[float, float]:
        return self.of_longest or (self.mean, self.square)


# by use: "pretrain", "sft", "sts", "texts", and ("query" or "document", "weak" or "supervised")
Lengths = dict[Any, Texts]


def of(config: Config) -> tuple[Lengths, str]:
    """The lengths of a run's texts, and where they are from.

    From plan.tokens; else from the token shards of out_dir, if all are there; else every text has max_tokens.
    """
    if config.plan.tokens:
        given = dict(zip(config.stages, config.plan.tokens))
        # spread as an exponential distribution is
        texts = {name: Texts(n, min(2 * n**2, n * getattr(config, name).max_tokens)) for name, n in given.items()}
        return _by_use(texts), "plan.tokens"
    found = _of_shards(config)
    if found:
        return found, f"the shards in {config.out_dir}"
    return longest(config), "max_tokens, which none exceeds"


def longest(config: Config) -> Lengths:
    """The lengths if every text had max_tokens."""
    most = {name: getattr(config, name).max_tokens for name in config.stages}
    return _by_use({name: Texts(n, n**2) for name, n in most.items()})


def _by_use(texts):
    pairs = {(part, name): texts[name] for name in ("weak", "supervised") if name in texts for part in PARTS}
    beside = {use: texts[name] for use, name in (("texts", "weak"), ("sts", "supervised")) if name in texts}
    return texts | pairs | beside


def _of_shards(config):
    """{} if some shards are missing. Writes nothing."""
    if not Tokenizer.of(config.out_dir):
        return {}
    try:
        _, jobs, _ = datasets.plan(dataclasses.replace(config, validation=Validation()))
    except UserError:  # a source that is not here, on a machine that only plans
        return {}
    if not all(job.finished() for job in jobs.values()):
        return {}
    drawn: dict[Any, list] = {}
    for (use, _), job in jobs.items():
        shards = Shards(job.folder)
        share = job.about.weight * len(shards) ** job.stage.size_power
        for key, lengths in _sampled(use, shards).items():
            drawn.setdefault(key, []).append((share, lengths, np.minimum(lengths, job.stage.max_tokens)))
    found = {}
    for key, parts in drawn.items():
        whole = sum(share for share, *_ in parts)
        means = [(share, float(cut.mean()), float((cut**2).mean())) for share, _, cut in parts]
        mean, square = (sum(one[0] * one[k] for one in means) / whole for k in (1, 2))
        found[key] = Texts(max(mean, 1e-9), square, of_longest=max(one[1:] for one in means))
    if "sft" in found:
        every, answers = (sum(share * n.mean() for share, n, _ in drawn[key]) for key in ("sft", "answer"))
        found["sft"] = found["sft"]._replace(learnt=answers / max(every, 1e-9))
    return found


def _sampled(use, shards):
    """{key of Lengths: float64 lengths of texts}; "answer" has the part of an instruction's text to learn."""
    records = np.unique(np.linspace(0, len(shards) - 1, SAMPLE).astype(np.int64))

    def field(number):
        return shards.lengths(records, number).astype(np.float64)

    if use == "sft":
        return {use: field(0) + field(1) + field(2), "answer": field(2)}
    if use == "sts":
        return {use: np.concatenate((field(0), field(1)))}
    if use in ("weak", "supervised"):
        return {(part, use): field(number) for number, part in enumerate(PARTS)}
    return {use: field(0)}
