"""The order of a step, as planned, beside what ranks do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conan_engine.config import Config, Model
from conan_engine.plan import schedule
from conan_engine.plan.layout import Layout
from conan_engine.plan.loads import Load
from conan_engine.plan.memory import Form
from conan_engine.plan.schedule import Compute, Send, Wait
from conan_engine.plan.timing import Times

ROOT = Path(__file__).resolve().parents[2]
TIMES = Times(block=1.0, block_backward=2.0, loss=0.5, table=0.1, table_backward=0.2, optimizer=0.3)
PAIRS = Load(tokens=4096, texts=64, pairs=2**18, learnt=0, at_once=1024, parts=4, queries=32, documents=32, dims=1)
TEXT = PAIRS._replace(learnt=4096, queries=0, documents=0, both_ways=False)
FORM = Form("cuda", True, False, 4, 1)


@pytest.fixture(scope="module")
def layouts():
    config = Config(model=Model(layers=3, width=512, ffn=65536, heads=8, kv_heads=8))
    return {tensor: Layout(config, "pretrain", 8192, tensor) for tensor in (1, 2)}


def computes(layouts, load, form):
    events = schedule.step(layouts[form.tensor], load, form, TIMES)
    return sum(one.seconds for one in events if isinstance(one, Compute))


def test_gradient_caching_computes_the_forward_pass_of_each_part_but_the_last_twice(layouts):
    forward, backward = 0.1 + 3 * 1.0, 3 * 2.0 + 0.2
    assert computes(layouts, TEXT, FORM) == pytest.approx(4 * (forward + 0.5 + backward) + 0.3)
    assert computes(layouts, PAIRS._replace(parts=1), FORM) == pytest.approx(forward + 0.5 + backward + 0.3)
    assert computes(layouts, PAIRS, FORM) == pytest.approx(4 * (2 * forward + backward) - forward + 0.5 + 0.3)
    again = computes(layouts, TEXT, FORM._replace(recompute=True)) - computes(layouts, TEXT, FORM)
    assert again == pytest.approx(4 * 3 * 1.0)


def test_every_bucket_is_summed_once_and_its_new_weights_are_waited_for_before_they_compute(layouts):
    layout = layouts[1]
    assert len(layout.buckets) > 4
    for load in (TEXT, PAIRS):
        events = schedule.step(layout, load, FORM, TIMES)
        summed = [one.bucket for one in events if isinstance(one, Send) and one.bucket is not None]
        last = len(layout.buckets) - 1
        assert summed == [*range(last, -1, -1), *range(last + 1)], "last layers first, then the new weights in order"
        start = next(i for i, one in enumerate(events) if isinstance(one, Compute))
        assert {one.bucket for one in events[:start] if isinstance(one, Wait)} == {
            bucket for bucket, halves in enumerate(layout.halves) if -1 in halves
        }


def test_one_rank_sends_nothing(layouts):
    events = schedule.step(layouts[1], PAIRS, Form("cuda", True), TIMES)
    assert not [one for one in events if isinstance(one, Send)]


def test_tensor_ranks_exchange_all_tokens_four_times_a_block_and_pass(layouts):
    def sent(form):
        events = schedule.step(layouts[2], TEXT._replace(parts=1), form, TIMES)
        return [one for one in events if isinstance(one, Send) and one.group == "tensor" and one.kind != "all-reduce"]

    plain, again = (sent(FORM._replace(tensor=2, recompute=recompute)) for recompute in (False, True))
    assert {one.size for one in plain} == {2 * 4096 * 512}
    assert len(plain) == 2 * 3 * 4 + 4, "and the token table's and the LM head's"
    assert len(again) == len(plain) + 3 * 3, "a block's last sum is not needed again"


@pytest.mark.parametrize(
    "settings",
    [["--tensor_parallel=2", "--recompute=block"], pytest.param([], marks=pytest.mark.slow)],
    ids=["tensor", "data"],
)
def test_four_ranks_send_what_is_planned_in_the_order_that_is_planned(settings, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4", "--standalone"]
    ended = subprocess.run(
        [*command, str(ROOT / "benchmarks/overlap.py"), f"--out={tmp_path}", *settings],
        capture_output=True, text=True, timeout=240, cwd=ROOT,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    (path,) = tmp_path.glob("collectives-4-*.json")
    stages = json.loads(path.read_text())["stages"]
    assert list(stages) == ["pretrain", "weak"]
    for row in stages.values():
        assert row["same_order"] and row["same_bytes_of_data"] and row["collectives"] > 10
        assert row["bytes_of_tensor"] == pytest.approx(row["planned_bytes_of_tensor"], rel=0.15)
