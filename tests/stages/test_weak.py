"""What a step of the weak stage draws and learns, and how far the soft mask is open when."""

import pytest
import torch
from runs import shards_of
from several import textbook, texts_of

from conan_engine.data import build
from conan_engine.model.transformer import Transformer
from conan_engine.parallel.mesh import Mesh
from conan_engine.settings import load
from conan_engine.stages.weak import ALPHA, Weak


@pytest.mark.parametrize(
    ("schedule", "quarter", "half"),
    [("linear", 0.25, 0.5), ("accelerating", 0.0625, 0.25), ("decelerating", 0.4375, 0.75)],
)
def test_soft_mask_schedules(schedule, quarter, half):
    alpha = ALPHA[schedule]
    assert (alpha(0.0), alpha(0.25), alpha(0.5), alpha(1.0)) == (0.0, quarter, half, 1.0)


@pytest.mark.parametrize(("schedule", "alpha"), [("open", 1.0), ("closed", 0.0)])
def test_a_mask_that_does_not_open(schedule, alpha):
    assert [ALPHA[schedule](progress) for progress in (0.0, 0.3, 1.0)] == [alpha] * 3


def weak_stage(tiny, run, *overrides):
    """The stage, its config, and a model for it."""
    config = load(tiny, [f"--out_dir={run}", *overrides])
    tokenizer = build.make_tokenizer(config.tokenizer, [], run)
    shards = {source: shards_of(source, "weak", config.weak, tokenizer, run / "data") for source in config.weak.data}
    return (
        Weak(config, shards, {}, Mesh("cpu")),
        config,
        Transformer(config.model, tokenizer.vocab_size).init_weights(0),
    )


def test_a_token_budget_sets_how_many_pairs_a_step_has(tiny, untrained_run):
    stage, _, model = weak_stage(tiny, untrained_run, "--weak.batch_tokens=500")
    batches = [stage.draw() for _ in range(6)]
    assert all(500 - 2 * 32 < len(batch.tokens) <= 500 for batch, _ in batches)  # a pair has at most 2 x 32
    assert len({len(batch.records) for batch, _ in batches}) > 1
    assert stage.backward(model, batches[0], 0)["tokens"] == len(batches[0][0].tokens)
    stage.close()


def test_the_weak_stage_starts_causal_and_ends_bidirectional(tiny, untrained_run):
    stage, config, model = weak_stage(tiny, untrained_run, "--weak.steps=5")
    rows = [stage.backward(model, stage.draw(), step) for step in range(5)]
    assert [row["alpha"] for row in rows] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert {row["source"] for row in rows} == set(config.weak.data)


def test_the_weak_loss_is_the_mean_over_its_dims(tiny, untrained_run):
    stage, config, model = weak_stage(tiny, untrained_run, "--weak.dims=[8, 32]")
    batch, found = stage.draw(), {}
    for dims in ([], [8], [32], config.weak.dims):
        stage.settings.dims = dims
        found[tuple(dims)] = stage.backward(model, batch, 3)["loss"]
    assert found[8, 32] == pytest.approx((found[8,] + found[32,]) / 2, rel=1e-4) and found[8,] != pytest.approx(
        found[32,], rel=1e-3
    )
    assert found[32,] == pytest.approx(found[()], rel=1e-4)
    stage.close()


def test_a_weak_step_of_queries_with_several_positives_is_the_textbooks(several):
    make, mask = several
    config, tokenizer, model, shards = make("weak")
    stage = Weak(config, shards, {}, Mesh("cpu"))
    batch = stage.draw()
    row = stage.backward(model, batch, 2)
    batch, _ = batch
    texts = texts_of(tokenizer, batch)
    embeddings = model.embed(batch.tokens, batch.cu_seqlens, 1.0, config.weak.mask)
    expected = textbook(*embeddings.chunk(2), mask(texts[:16], texts[16:]), config.weak.temperature)
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-4)
    plain = textbook(*embeddings.chunk(2), mask(texts[:16], texts[16:]) & False, config.weak.temperature)
    assert plain > expected + 0.1, "counting them as negatives is another loss"
    for parameter, gradient in zip(model.parameters(), torch.autograd.grad(expected, list(model.parameters()))):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    stage.close()
