"""metrics.jsonl across a kill, and the picture of it."""

import json

import pytest

from conan_engine.run.log import Log, rows


def row(loss, source="a"):
    return {"loss": loss, "tokens_per_s": 100.0, "source": source}


def lines(run):
    return [
        (r["stage"], r["step"], r["loss"]) for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    ]


@pytest.fixture
def run(tmp_path):
    """A run killed in its third step of sft, while it wrote the line."""
    log = Log(tmp_path, first=True)
    log.resume([], "pretrain", 0)
    for name in ("pretrain", "sft"):
        with log.stage(name, 3, 0):
            for step in range(3 if name == "pretrain" else 2):
                log.step(step, row(float(step), "b" if step else "a"))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "sft", "step": 2, "lo')
    return tmp_path


def test_a_resumed_run_forgets_what_it_will_do_again(run):
    log = Log(run, first=True)
    log.resume(["pretrain"], "sft", 1)
    assert lines(run) == [("pretrain", 0, 0.0), ("pretrain", 1, 1.0), ("pretrain", 2, 2.0), ("sft", 0, 0.0)]
    with log.stage("sft", 3, 1):
        log.step(1, row(7.0))
    assert lines(run)[-1] == ("sft", 1, 7.0)


def test_a_line_that_was_cut_off_is_not_read(run):
    assert [(r["stage"], r["step"]) for r in rows(run / "metrics.jsonl")] == [
        r[:2] for r in (*(("pretrain", i) for i in range(3)), ("sft", 0), ("sft", 1))
    ]


def test_the_picture_is_drawn_of_what_was_logged(run):
    log = Log(run, first=True)
    log.resume(["pretrain"], "sft", 2)
    log.draw()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG") and not list(run.glob("*.partial*"))


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = Log(tmp_path, first=False)
    log.resume([], "pretrain", 0)
    with log.stage("pretrain", 2, 0):
        log.step(0, row(1.0))
    log.say("a line")
    log.draw()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""
