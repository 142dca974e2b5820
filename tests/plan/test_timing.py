"""The predicted time of a step, beside what an H200 took."""

import dataclasses
import json
from pathlib import Path

import plan as benchmark
import pytest

from conan_engine.config import Config, Model
from conan_engine.plan import devices, timing
from conan_engine.plan.layout import Layout
from conan_engine.plan.loads import Load
from conan_engine.plan.memory import Form

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"
H200, ONE = devices.named("h200"), Form("cuda", True)


def total(times, layers):
    return layers * (times.block + times.block_backward) + sum(times[2:])


def load(tokens, length, **numbers):
    numbers = {"learnt": 0, "at_once": tokens, "parts": 1, **numbers}
    return Load(tokens=tokens, texts=tokens / length, pairs=tokens * length, **numbers)


def test_the_steps_measured_on_an_h200_are_within_a_fifth():
    rows = list(benchmark.on_gpu(RESULTS / "step-h200.json"))
    assert [row["work"] for row in rows] == ["text", "pairs"]
    for row in rows:
        assert row["planned_seconds"] == pytest.approx(row["seconds"], rel=0.2), row["work"]


@pytest.mark.parametrize("form", ["ours", "ours, plain"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_attention_measured_on_an_h200_is_within_a_quarter(alpha, form):
    layout, found = Layout(Config(), "weak", 150_000), 0
    device = dataclasses.replace(H200, hopper=form == "ours")
    for row in json.loads((RESULTS / "attn-h200.json").read_text())["rows"]:
        length = {"L = 2048": 2048, "L = 16384": 16384, "32 x 512": 512}.get(row["batch"])
        if row["form"] == form and row["alpha"] == alpha and row["D"] == 112 and length and "both" in row:
            work = load(row["tokens"], length, both_ways=alpha > 0)
            if alpha == 0:
                work = work._replace(pairs=work.pairs / 2)
            forward, backward = timing.attention(layout.shape, work, ONE, device)
            assert forward == pytest.approx(row["forward"], rel=0.25), length
            assert forward + backward == pytest.approx(row["both"], rel=0.25), length
            found += 1
    assert found == 3


def test_two_tensor_ranks_halve_the_products_and_data_ranks_the_optimizer():
    config = Config()
    work = load(16384, 512)
    one, two = (
        timing.of(Layout(config, "weak", 150_000, t), work, Form("cuda", True, False, 1, t), H200) for t in (1, 2)
    )
    assert two.block == pytest.approx(one.block / 2, rel=0.02)
    layout = Layout(config, "weak", 150_000)
    shared = timing.of(layout, work, ONE._replace(data=64), H200)
    assert shared.optimizer < one.optimizer / 3 and shared.block == one.block


def test_a_small_model_takes_as_long_as_its_kernels_take_to_start():
    config = Config()
    config.model.width, config.model.ffn, config.model.heads, config.model.kv_heads = 64, 64, 2, 2
    times = timing.of(Layout(config, "weak", 1000), load(64, 16), ONE, H200)
    assert (times.block, times.block_backward) == timing.LAUNCH


def test_infonce_grows_with_the_ranks_and_the_dims():
    layout = Layout(Config(), "weak", 150_000)
    work = load(4096, 64, queries=512, documents=512, dims=1)
    one, many = (timing.of(layout, work, ONE._replace(data=data), H200).loss for data in (1, 64))
    assert many == pytest.approx(64 * one)
    assert timing.of(layout, work._replace(dims=7), ONE, H200).loss == pytest.approx(one * (1 + 6 * timing.OF_DIM))


def test_a_head_dim_that_the_kernels_for_hopper_do_not_take_is_planned_as_on_other_gpus():
    plain = dataclasses.replace(H200, hopper=False)
    for head, as_plain in ((48, True), (128, False)):
        shape = Layout(Config(model=Model(head_dim=head)), "weak", 150_000).shape
        work = load(16384, 2048, both_ways=True)
        times = [timing.attention(shape, work, ONE, device) for device in (H200, plain)]
        assert (times[0] == times[1]) == as_plain, head
