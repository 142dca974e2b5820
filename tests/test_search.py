"""`python -m conan_engine.search`: the best first, with score and place; vectors kept until weights or texts change."""

import subprocess
import sys

import numpy as np
import pytest
from runs import ROOT

from conan_engine import search
from conan_engine.data.sources import docstrings
from conan_engine.errors import UserError
from conan_engine.evaluation.encoder import Encoder

SUMMARIES = [
    "Shortest path between two nodes.",
    "Roots of a polynomial.",
    "Read a table from a file.",
    "Close the socket.",
]


def write_module(path, summaries):
    functions = (
        f'def f{i}():\n    """{summary}\n\n    {summary} It takes {i} arguments."""\n'
        for i, summary in enumerate(summaries)
    )
    path.write_text("".join(functions))


@pytest.fixture
def module(tmp_path):
    """The only file of the only package."""
    write_module(tmp_path / "m.py", SUMMARIES)
    return tmp_path / "m.py"


@pytest.fixture
def ask(untrained_run, module, monkeypatch, capsys):
    monkeypatch.setattr(search, "TRAINING_PACKAGES", ("p",))
    monkeypatch.setattr(search, "HELD_OUT_PACKAGES", ("q",))
    monkeypatch.setattr(search.places, "installed", lambda package: package == "p")
    monkeypatch.setattr(docstrings, "modules", lambda package: iter([(module, "p.m")]))

    def ask(*arguments):
        monkeypatch.setattr(sys, "argv", ["search", str(untrained_run), *arguments])
        search.main()
        return capsys.readouterr().out

    yield ask
    for path in untrained_run.glob("search-*"):
        path.unlink()


def test_the_best_come_first_with_score_name_and_place(ask, module):
    out = ask("Roots of a polynomial.\nRoots of a polynomial. It takes 1 arguments.", "--count", "3").splitlines()[-6:]
    assert out[0].split()[1:] == ["p.m.f1", f"{module}:5"] and out[1].strip() == "Roots of a polynomial."
    scores = [float(line.split()[0]) for line in out[::2]]
    assert scores[0] == pytest.approx(1.0, abs=2e-3) and scores == sorted(scores, reverse=True)


def test_vectors_are_made_once_and_again_when_the_documentation_changes(ask, untrained_run, module, monkeypatch):
    assert "embedding 4 documents" in ask("a path")
    with monkeypatch.context() as patch:
        patch.setattr(docstrings, "read", None)  # what is kept needs no reading
        assert ask("a path").count("p.m.f") == 4
    write_module(module, SUMMARIES[:2])
    assert "embedding 2 documents" in ask("a path")
    kept = [np.load(path) for path in untrained_run.glob("search-*")]
    assert [len(of["vectors"]) for of in kept] == [2], "the ones of before are removed"
    expected = Encoder.load(untrained_run).encode(
        [f"{x}\n{x} It takes {i} arguments." for i, x in enumerate(SUMMARIES[:2])]
    )
    np.testing.assert_allclose(kept[0]["vectors"], expected, atol=1e-5)


def test_a_run_that_cannot_be_written_is_searched_all_the_same(ask, untrained_run, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(search.np, "savez", full)
    out = ask("a path")
    assert "cannot write it (No space left on device)" in out and "p.m.f0" in out
    assert not list(untrained_run.glob("search-*"))


def test_what_a_terminal_cannot_show_is_escaped(ask, module):
    write_module(module, [r"half a pair: \ud800"])
    assert r"half a pair: \ud800" in ask("half a pair \udcff")


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_text_is_refused(ask, text):
    with pytest.raises(UserError, match="is empty"):
        ask(text)


@pytest.mark.parametrize("count", ["0", "-1"])
def test_a_count_below_one_is_refused(ask, count):
    with pytest.raises(UserError, match=f"--count is {count}"):
        ask("a path", "--count", count)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["a path"], "no trained run here"), ([" "], "is empty"), (["a path", "--count", "0"], "--count is 0")],
)
def test_the_command_says_a_mistake_in_one_line(tmp_path, arguments, said):
    command = [sys.executable, "-m", "conan_engine.search", str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1 and not done.stdout, (
        done.stderr
    )
