"""What --plan_only says, and which meshes it finds."""

import re

import pytest

from conan_engine.config import Source
from conan_engine.errors import UserError
from conan_engine.parallel.mesh import Mesh
from conan_engine.plan import devices, lengths, memory
from conan_engine.plan.memory import Form
from conan_engine.plan.predicting import Cut, Machines, Planner
from conan_engine.plan.replay import Links
from conan_engine.plan.report import report
from conan_engine.settings import load

PAIRS = ['--stages=["weak"]', "--weak.batch=1024", "--device=cpu"]


def said(capsys, *settings):
    report(load("conan-1.4b", [*PAIRS, "--plan_only=true", *settings]), Mesh("cpu"))
    return capsys.readouterr().out


def test_a_run_says_its_size_in_one_line(capsys):
    report(load("demo", ["--device=cpu"]), Mesh("cpu"))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith("17M parameters; per device (1 in all) 0.25 GiB of weights")


def test_a_model_that_does_not_fit_is_one_line():
    with pytest.raises(UserError, match=r"the model needs [\d,.]+ GiB a device before activations"):
        report(load("conan-1.4b", [*PAIRS, "--model.layers=1000", "--device=cpu"]), Mesh("cpu"))


def test_memory_is_told_by_kind_and_sums_up(capsys):
    out = said(capsys)
    assert "Lengths of texts: max_tokens, which none exceeds." in out
    whole, kinds = re.search(r"memory of a device: ([\d.]+) GiB: (.*)", out).groups()
    sizes = dict(re.findall(r"([a-z ]+?) ([\d.]+)(?:, |$)", kinds))
    assert list(sizes) == [
        "weights",
        "gradients",
        "moments",
        "checkpoint",
        "activations",
        "workspace",
        "process",
        "fragments",
    ]
    assert sum(map(float, sizes.values())) == pytest.approx(float(whole), abs=0.05)
    assert "GPU hours" not in out and "--plan.device=h200" in out


def test_a_gpus_plan_has_times_and_meshes_best_first(capsys):
    out = said(capsys, "--plan.device=h200", "--plan.gpus=64", "--plan.tokens=[100]")
    assert "for 64 H200, 8 a machine, with links of 450 GB/s within a machine and 50 GB/s between two" in out
    assert re.search(r"time of a step: [\d,]+ ms, in which it waits [\d,]+ ms for data ranks", out)
    rows = re.findall(r"^ *(\d+) x (\d+) +(none|block) .* ([\d.]+) +[\d,]+$", out, re.MULTILINE)
    assert {(int(d) * int(t)) for d, t, *_ in rows} == {64} and len(rows) == 8
    days = [float(row[3]) for row in rows]
    assert days == sorted(days) and days[0] > 0
    slower = said(capsys, "--plan.device=h200", "--plan.gpus=64", "--plan.tokens=[100]", "--plan.links=[50, 5]")
    assert "with links of 50 GB/s within a machine and 5 GB/s between two" in slower


def test_a_batch_that_the_ranks_cannot_split_is_told(capsys):
    out = said(capsys, "--plan.device=h100", "--plan.gpus=48", "--tensor_parallel=1")
    assert "weak: 48 ranks cannot split weak.batch = 1024 evenly" in out


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("--plan.device=tpu", "plan.device is 'tpu'; expected one of B200"),
        ("--plan.device=h200 --precision=float32", "the time of float32 products is not known"),
        ("--plan.device=h200 --model.head_dim=136", "on a GPU they have 16, 32, ... or 128"),
        ("--plan.links=[1]", "plan.links is .1.0.; expected two numbers above 0"),
        ("--plan.tokens=[1,2]", "plan.tokens is .1, 2.; expected a number for each of weak, of at most 512"),
        ("--plan.tokens=[600]", "plan.tokens is .600.; expected a number for each of weak, of at most 512"),
    ],
)
def test_a_wrong_setting_is_one_line(capsys, setting, line):
    with pytest.raises(UserError, match=line):
        said(capsys, *setting.split())


def test_gpus_that_tensor_ranks_do_not_divide_are_one_line(capsys):
    with pytest.raises(UserError, match="plan.gpus is 3; expected a multiple of tensor_parallel = 2"):
        config = load("conan-1.4b", [*PAIRS, "--plan_only=true", "--plan.device=h100", "--plan.gpus=3"])
        config.tensor_parallel = 2
        report(config, Mesh("cpu"))


def fitting(memory_gib, *settings):
    device = devices.named("h100")
    machines = Machines(devices.Device("small", device.tflops, memory_gib, device.bandwidth, device.link), 8, LINKS)
    config = load("conan-1.4b", [*PAIRS, *settings])
    return Planner(config, 150_000, lengths.longest(config)).fitting(machines), machines


LINKS = Links(450, 50, 8)


def test_every_mesh_fits_and_takes_the_fastest_chunk_that_does():
    for gib in (200, 40):
        meshes, machines = fitting(gib)
        assert meshes
        for (one,) in meshes:
            assert one.memory <= 0.94 * gib * 2**30 and one.fits(machines)
            assert one.form.data * one.form.tensor == 8
    roomy, tight = fitting(200)[0][0][0], fitting(40)[0][0][0]
    assert roomy.seconds < tight.seconds


def test_a_batch_that_divides_by_no_mesh_and_a_model_too_large_for_all_leave_none():
    assert {one.form.data for (one,) in fitting(200, "--weak.batch=7")[0]} == {1}
    assert not fitting(2)[0]


def test_uneven_batches_are_named():
    config = load("conan-1.4b", PAIRS)
    config.supervised.sts, config.supervised.batch = {"a": Source()}, 64
    planner = Planner(config, 150_000, lengths.longest(config))
    assert planner.uneven("supervised", 64) == "64 ranks cannot split supervised.sts_batch = 32 evenly"
    assert planner.uneven("supervised", 32) == ""
    config.weak.batch_tokens = 1000
    assert planner.uneven("weak", 1000) == ""


def test_a_mesh_takes_the_largest_budget_of_tokens_that_fits():
    for gib in (200, 24):
        meshes, machines = fitting(gib, "--weak.chunk_tokens=8192")
        assert meshes and all(one.cut.chunk == 0 and one.fits(machines) for (one,) in meshes)
    (one,) = meshes[0]
    assert one.cut.chunk_tokens and str(one.cut) == f"{one.cut.chunk_tokens}t"
    twice = Cut(chunk_tokens=2 * one.cut.chunk_tokens)
    config = load("conan-1.4b", PAIRS)
    assert not Planner(config, 150_000, lengths.longest(config)).stage("weak", one.form, cut=twice).fits(machines)


def test_a_budget_of_tokens_is_told(capsys):
    out = said(capsys, "--weak.chunk_tokens=8192", "--plan.device=h200", "--plan.tokens=[100]")
    assert "tensor ranks; chunk_tokens 8192" in out


def test_chunks_and_recompute_take_less_memory():
    config = load("conan-1.4b", PAIRS)
    planner = Planner(config, 150_000, lengths.longest(config))
    form = Form("cuda", True)
    whole, parts = (planner.stage("weak", form, cut=Cut(chunk)) for chunk in (0, 64))
    again = planner.stage("weak", form._replace(recompute=True))
    assert parts.memory < whole.memory and again.memory < whole.memory
    held = sum(memory.of_weights(planner.layout("weak", 1), form).values())
    assert parts.memory > held and parts.flop == whole.flop
