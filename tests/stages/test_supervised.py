"""What a step of the supervised stage takes for a negative, and its two losses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from runs import one_line, shards_of, train, untimed, write_lines
from several import textbook, texts_of

from conan_engine.config import Source
from conan_engine.parallel.mesh import Mesh
from conan_engine.stages.packed import Packed, concatenate, packed
from conan_engine.stages.supervised import Supervised


@pytest.mark.parametrize(("in_batch", "count"), [(False, 3), (False, 1), (True, 0), (True, 3)])
def test_a_source_has_as_many_negatives_as_it_asks_for(several, in_batch, count):
    make, mask = several
    config, tokenizer, model, shards = make("supervised", "--supervised.dims=[32]")
    config.supervised.sts = {}
    (name,) = shards
    config.supervised.data = {name: Source(in_batch_negatives=in_batch, hard_negatives=count)}
    stage = Supervised(config, shards, {}, Mesh("cpu"))
    stage.mine(model, Mesh("cpu"))
    batch, _ = stage.draw()
    hard = np.empty((2, 0), np.int64) if count == 0 else stage.pools[name].draw(batch.records)[:2]
    hard = Packed(*map(torch.from_numpy, shards[name].gather(*hard, 16)))
    assert len(hard.cu_seqlens) - 1 == 16 * count
    everything = concatenate(packed(batch), hard)
    embeddings = model.embed(everything.tokens, everything.cu_seqlens, 1.0, "column")
    texts = texts_of(tokenizer, everything)
    right = mask(texts[:16], texts[16:])
    if not in_batch:  # all but one's own
        own = torch.cat(
            (torch.eye(16, dtype=torch.bool), torch.eye(16, dtype=torch.bool).repeat_interleave(count, 1)), dim=1
        )
        assert not (right[:, 16:] & own[:, 16:]).any()
        right = ~own
    expected = textbook(embeddings[:16], embeddings[16:], right, config.supervised.temperature)
    row = stage.backward(model, (batch, None), 0)
    assert row["info_nce"] == pytest.approx(expected.item(), rel=1e-4)
    for parameter, gradient in zip(model.parameters(), torch.autograd.grad(expected, list(model.parameters()))):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    stage.close()
    again = Supervised(config, shards, {}, Mesh("cpu"))
    again.load_state(stage.state())
    assert again.pools.keys() == stage.pools.keys() == ({name} if count else set())


def test_retrieval_and_sts_together_or_by_turns(several, tiny):
    make, _ = several
    config, tokenizer, model, shards = make(
        "supervised", "--supervised.dims=[32]", "--negatives.low=-1", "--negatives.bound=-1"
    )
    (source,) = config.supervised.sts
    sts = {source: shards_of(source, "sts", config.supervised, tokenizer, Path(config.out_dir, "data"))}
    stage = Supervised(config, shards, sts, Mesh("cpu"))
    stage.mine(model, Mesh("cpu"))
    batch = stage.draw()

    def step(balance, number):
        config.supervised.balance = balance
        model.zero_grad()
        row = stage.backward(model, batch, number)
        return row, torch.cat([p.grad.flatten() for p in model.parameters()])

    (whole, of_whole) = step("together", 1)
    (retrieval, of_retrieval) = step("alternating", 0)
    (similarity, of_similarity) = step("alternating", 1)
    assert retrieval["info_nce"] == pytest.approx(whole["info_nce"], rel=1e-4) and retrieval["cosent"] == 0
    assert similarity["cosent"] == pytest.approx(whole["cosent"], rel=1e-4) and similarity["info_nce"] == 0
    assert whole["loss"] == pytest.approx(retrieval["loss"] + similarity["loss"], rel=1e-4)
    torch.testing.assert_close(of_whole, of_retrieval + of_similarity, rtol=1e-3, atol=1e-5)
    assert similarity["tokens"] + retrieval["tokens"] == whole["tokens"]
    stage.close()


def test_a_supervised_step_never_takes_what_is_right_for_a_negative(several):
    make, mask = several
    config, tokenizer, model, shards = make("supervised", "--supervised.dims=[32]")
    config.supervised.sts = {}
    stage = Supervised(config, shards, {}, Mesh("cpu"))
    stage.mine(model, Mesh("cpu"))
    ((name, pools),) = stage.pools.items()
    batch, _ = stage.draw()
    record, field, _ = pools.draw(batch.records)
    hard = Packed(*map(torch.from_numpy, shards[name].gather(record, field, 16)))
    queries, positives, negatives = (texts_of(tokenizer, x) for x in (*packed(batch).split(16), hard))
    assert (
        not mask(queries, negatives)[torch.arange(16), torch.arange(0, 32, 2)].any() and mask(queries, negatives).any()
    )
    row = stage.backward(model, (batch, None), 0)
    everything = concatenate(packed(batch), hard)
    embeddings = model.embed(everything.tokens, everything.cu_seqlens, 1.0, "column")
    expected = textbook(
        embeddings[:16], embeddings[16:], mask(queries, positives + negatives), config.supervised.temperature
    )
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-4)
    stage.close()


CLASSES = [
    {"text": f"a review of kind {i % 3}, number {i}", "label": ("good", "bad", "other")[i % 3]} for i in range(60)
]


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (3, "3 different answers, so 2 hard negatives per query instead of 7"),
        (2, "2 different answers, so 1 hard negative per query"),
        (1, "1 different answers, so no hard negatives"),
    ],
)
def test_a_source_of_few_classes_has_what_negatives_it_has(tiny, tmp_path, classes, said):
    few = write_lines(
        tmp_path / "few.jsonl", [row for row in CLASSES if row["label"] in ("good", "bad", "other")[:classes]]
    )
    code, out, err = train(
        tiny,
        tmp_path / "run",
        "--stages=['supervised']",
        f"--supervised.data.{few}=1",
        "--supervised.steps=6",
        "--supervised.sts={}",
    )
    assert code == 0 and said in out + err, err
    rows = [row for row in untimed(tmp_path / "run") if row["source"] == str(few)]
    assert rows and all(np.isfinite(row["loss"]) for row in rows) and (classes == 1 or rows[0]["loss"] > 0)


def test_a_source_of_one_class_and_nothing_in_the_batch_is_refused(tiny, tmp_path):
    few = write_lines(tmp_path / "few.jsonl", [row for row in CLASSES if row["label"] == "good"])
    table = "{ weight = 1, in_batch_negatives = false }"
    one_line(
        train(tiny, tmp_path / "run", "--stages=['supervised']", f"--supervised.data.{few}={table}"),
        "all its queries have the same answer, and in_batch_negatives is false",
    )
