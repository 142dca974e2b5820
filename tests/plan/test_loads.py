"""What a step computes, as planned, beside the counts of a run's own steps."""

import json

import pytest
import torch
import torch.nn.functional as F

from conan_engine.config import Config, Source
from conan_engine.plan import lengths, loads
from conan_engine.plan.lengths import Texts
from conan_engine.settings.reading import from_dict
from conan_engine.stages.packed import Packed


def known(name, mean, square=None):
    texts = Texts(mean, square or mean**2)
    return {name: texts, "sts": texts, "texts": texts, ("query", name): texts, ("document", name): texts}


def config(**settings):
    made = Config()
    for key, value in settings.items():
        section, _, name = key.rpartition("__")
        setattr(getattr(made, section) if section else made, name, value)
    return made


def test_rows_are_full_and_shared_out():
    made = config(pretrain__batch=64, pretrain__max_tokens=1000, pretrain__chunk=3)
    found = loads.of("pretrain", made, 8, known("pretrain", 100.0, 20_000.0))
    assert (found.tokens, found.texts, found.at_once, found.parts) == (8000, 80, 3000, 3)
    # a text of n tokens has n (n + 1) / 2 pairs
    assert found.pairs == (80 * 20_000 + 8000) / 2 and found.learnt == 8000 and not found.both_ways
    made.pretrain.masked = 0.25
    masked = loads.of("pretrain", made, 8, known("pretrain", 100.0, 20_000.0))
    assert masked.both_ways and masked.pairs == 80 * 20_000 and masked.learnt == 2000


def test_pairs_and_their_hard_negatives():
    made = config(supervised__batch=32, supervised__sts={"a": Source()}, supervised__data={"b": Source()})
    made.negatives.count = 7
    found = loads.of("supervised", made, 4, known("supervised", 50.0))
    assert (found.queries, found.documents, found.texts) == (8, 64, 8 * 9 + 16)
    assert found.tokens == 50 * found.texts and found.pairs == 2500 * found.texts and found.learnt == 0
    assert found.at_once == found.tokens and found.parts == 1
    made.supervised.balance = "alternating"
    assert loads.of("supervised", made, 4, known("supervised", 50.0)).tokens == found.tokens / 2


def test_a_batch_of_tokens_has_as_many_pairs_as_fit():
    made = config(weak__batch_tokens=8000)
    found = loads.of("weak", made, 2, known("weak", 50.0))
    assert (found.tokens, found.queries, found.at_once) == (4000, 40, 4000)


def test_a_part_holds_the_longest_kind_of_texts_and_is_never_longer_than_all_may_be():
    made = config(weak__batch=100, weak__chunk=50, weak__max_tokens=64)
    texts = known("weak", 10.0)
    assert loads.of("weak", made, 1, texts | {("document", "weak"): Texts(60.0, 3600.0)}).at_once == 50 * 60
    spread = loads.of("weak", made, 1, texts | {("document", "weak"): Texts(40.0, 2000.0)}).at_once
    assert 50 * 40 < spread <= 50 * 64


@pytest.mark.parametrize("name", ["pretrain", "weak", "supervised"])
def test_a_budget_of_tokens_bounds_a_part(name):
    made = config(**{f"{name}__batch": 64, f"{name}__max_tokens": 400, f"{name}__chunk_tokens": 2000})
    texts = known(name, 100.0, 20_000.0)
    found = loads.of(name, made, 2, texts)
    assert found.at_once == 2000
    assert found.tokens / found.parts <= 2000 < found.tokens / (found.parts - 1) * 1.2
    getattr(made, name).chunk_tokens = 50
    assert loads.of(name, made, 2, texts).at_once == 400, "a longer text is a part of its own"
    getattr(made, name).chunk_tokens = 10**6
    assert loads.of(name, made, 2, texts).parts == 1


@pytest.mark.parametrize("spread", [0.0, 0.8, 1.5])
def test_as_many_parts_as_a_batch_is_cut_into(spread):
    parts, at_once, squares, total = [], [], 0.0, 0
    for _ in range(20):
        drawn = (torch.randn(512) * spread + 4.5).exp().clamp(1, 512).int()
        packed = Packed(
            torch.zeros(int(drawn.sum()), dtype=torch.int32), F.pad(drawn.cumsum(0, dtype=torch.int32), (1, 0))
        )
        pieces, _ = packed.split_by_tokens(3000)
        parts.append(len(pieces))
        at_once.append(max(len(piece.tokens) for piece in pieces))
        squares, total = squares + drawn.double().square().sum().item(), total + int(drawn.sum())
    made = config(weak__max_tokens=512, weak__batch=256, weak__chunk_tokens=3000)
    planned = loads.of("weak", made, 1, known("weak", total / 20 / 512, squares / 20 / 512))
    assert sum(parts) / 20 == pytest.approx(planned.parts, rel=0.1, abs=1)
    assert 0.9 * planned.at_once <= max(at_once) <= planned.at_once


def test_the_steps_of_a_run_have_the_tokens_that_are_planned_from_its_shards(whole):
    made = from_dict(json.loads((whole / "config.json").read_text()), "config.json")
    found, source = lengths.of(made)
    assert source == f"the shards in {whole}"
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for name in made.stages:
        planned = loads.of(name, made, 1, found)
        tokens = [row["tokens"] for row in rows if row["stage"] == name and "tokens" in row]
        assert len(tokens) == 6 and sum(tokens) / 6 == pytest.approx(planned.tokens, rel=0.15), name
        assert max(tokens) <= 1.001 * planned.at_once, name


def test_lengths_given_are_spread_and_never_longer_than_max_tokens():
    made = config(stages=["pretrain", "weak"])
    made.plan.tokens = [1000, 400]
    found, source = lengths.of(made)
    assert source == "plan.tokens"
    assert found["pretrain"] == Texts(1000, 2_000_000) and found["query", "weak"] == Texts(400, 400 * 512)


def test_a_source_that_is_not_here_leaves_max_tokens(tmp_path, whole):
    made = from_dict(json.loads((whole / "config.json").read_text()), "config.json")
    made.weak.data = {str(tmp_path / "elsewhere.jsonl"): Source()}
    assert lengths.of(made)[1] == "max_tokens, which none exceeds"


def test_without_shards_every_text_has_max_tokens(tmp_path):
    made = config(out_dir=str(tmp_path))
    found, source = lengths.of(made)
    assert found["sft"] == Texts(32768, 32768**2) and source == "max_tokens, which none exceeds"
    assert not list(tmp_path.iterdir())
