"""`python -m conan_engine.search`: the best first, with score and place; vectors and index are kept until what they
were made of changes; any ranks find the same."""

import json
import shutil
import subprocess
import sys

import faiss
import numpy as np
import pytest
from runs import ROOT, write_lines

from conan_engine import search
from conan_engine.data.sources import docstrings
from conan_engine.errors import UserError
from conan_engine.evaluation import searching
from conan_engine.evaluation.encoder import Encoder
from conan_engine.vectors import corpus as corpora
from conan_engine.vectors import nearest

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
def run(untrained_run, tmp_path):
    """A run of the test's own, in which a search keeps what it makes."""
    return shutil.copytree(untrained_run, tmp_path / "run")


@pytest.fixture
def ask(run, module, monkeypatch, capsys):
    """search.main of some arguments: (stdout, stderr)."""
    monkeypatch.setattr(search, "TRAINING_PACKAGES", ("p",))
    monkeypatch.setattr(search, "HELD_OUT_PACKAGES", ("q",))
    monkeypatch.setattr(search.places, "installed", lambda package: package == "p")
    monkeypatch.setattr(docstrings, "modules", lambda package: iter([(module, "p.m")]))

    def ask(*arguments):
        monkeypatch.setattr(sys, "argv", ["search", str(run), *map(str, arguments)])
        search.main()
        return capsys.readouterr()

    return ask


def test_the_best_come_first_with_score_name_and_place(ask, module):
    out = ask("Roots of a polynomial.\nRoots of a polynomial. It takes 1 arguments.", "--count", "3").out.splitlines()
    assert len(out) == 6 and out[0].split()[1:] == ["p.m.f1", f"{module}:5"]
    assert out[1].strip() == "Roots of a polynomial. Roots of a polynomial. It takes 1 arguments."
    scores = [float(line.split()[0]) for line in out[::2]]
    assert scores[0] == pytest.approx(1.0, abs=2e-3) and scores == sorted(scores, reverse=True)


def test_vectors_are_made_once_and_again_when_the_documentation_changes(ask, run, module, monkeypatch):
    assert "reading 1 files of documentation" in ask("a path").err
    with monkeypatch.context() as patch:
        patch.setattr(docstrings, "read", None)  # what is kept needs no reading
        out, err = ask("a path")
        assert out.count("p.m.f") == 4 and not err
    write_module(module, SUMMARIES[:2])
    assert "float16 [2, 32]" in ask("a path").err
    (kept,) = run.glob("search-*/part-*.npy")
    assert len(list(run.glob("search-*.jsonl"))) == 1, "the ones of before are removed"
    expected = Encoder.load(run).encode([f"{x}\n{x} It takes {i} arguments." for i, x in enumerate(SUMMARIES[:2])])
    np.testing.assert_allclose(np.load(kept), expected, atol=1e-3)


def test_a_run_that_cannot_be_written_is_searched_all_the_same(ask, run, monkeypatch):
    monkeypatch.setattr(searching.os, "access", lambda path, mode: False)
    out, err = ask("a path")
    assert "cannot be written, so nothing is kept" in err and "p.m.f0" in out and not list(run.glob("search-*"))


def test_what_a_terminal_cannot_show_is_escaped(ask, module):
    write_module(module, [r"half a pair: \ud800"])
    assert r"half a pair: \ud800" in ask("half a pair \udcff").out


WORDS = ["graph", "tree", "matrix", "root", "edge", "prime", "series", "limit", "node", "path", "red", "bicycle"]


@pytest.fixture
def records(monkeypatch):
    monkeypatch.setattr(corpora, "UNIT", 3000)  # several units
    chance = np.random.default_rng()
    return [
        {"_id": f"d{i}", "title": f"T{i}", "text": " ".join(chance.choice(WORDS, chance.integers(3, 30)))}
        for i in range(200)
    ]


@pytest.fixture
def corpus(tmp_path, records):
    return write_lines(tmp_path / "c.jsonl", records)


def test_a_corpus_is_searched_exactly_and_its_vectors_are_kept(ask, run, corpus, records):
    out, err = ask("--queries", write_lines(corpus.parent / "q.jsonl", records[:30]), "--corpus", corpus, "--json")
    assert "float16 [200, 32]" in err
    encoder = Encoder.load(run)
    texts = [f"{record['title']}\n{record['text']}" for record in records]
    vectors = encoder.encode(texts)
    for i, line in enumerate(out.splitlines()):
        found = json.loads(line)
        assert found["id"] == f"d{i}" and found["query"] == texts[i] and len(found["results"]) == 10
        scores = [one["score"] for one in found["results"]]
        expected = np.sort(vectors @ vectors[i])[::-1][:10]
        np.testing.assert_allclose(scores, expected, atol=2e-3)
        for one in found["results"]:
            record = records[one["row"]]
            assert one == {"score": one["score"], "row": one["row"], "id": record["_id"], "title": record["title"],
                           "text": texts[one["row"]]}  # fmt: skip
    out, err = ask(texts[3], "--corpus", corpus, "--count", 1)
    assert out.split()[1:3] == ["d3", "T3"] and not err and "T3" not in out.splitlines()[1]
    write_lines(corpus, records[:150])
    assert "float16 [150, 32]" in ask("a path", "--corpus", corpus).err, "a changed corpus is encoded again"
    assert len(list(run.glob("search-c-*"))) == 1


def test_the_first_numbers_alone(ask, run, corpus, records):
    out, err = ask("red bicycle", "--corpus", corpus, "--dim", 8, "--json")
    assert "float16 [200, 8]" in err
    encoder = Encoder.load(run)
    vectors = encoder.encode([f"{record['title']}\n{record['text']}" for record in records], 8)
    best = np.sort(vectors @ encoder.encode(["red bicycle"], 8)[0])[::-1][:10]
    np.testing.assert_allclose([one["score"] for one in json.loads(out)["results"]], best, atol=2e-3)


def test_an_instruction_comes_before_the_query_alone(ask, run, corpus, records):
    found = json.loads(ask("red", "--corpus", corpus, "--instruction", "Find:", "--json").out)
    assert found["query"] == "Find:\nred"
    encoder = Encoder.load(run)
    one = found["results"][0]
    expected = encoder.encode([one["text"]])[0] @ encoder.encode(["Find:\nred"])[0]
    assert one["score"] == pytest.approx(float(expected), abs=2e-3)


@pytest.mark.parametrize("out", ["out", "out.npy"])
@pytest.mark.parametrize("index", ["IVF4,SQ8", "HNSW8"])
def test_an_index_is_made_once_beside_the_vectors(ask, run, corpus, records, out, index, monkeypatch):
    vectors = corpus.parent / out
    command = [sys.executable, "-m", "conan_engine.encode", run, corpus, vectors]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, cwd=ROOT)
    text = f"{records[9]['title']}\n{records[9]['text']}"
    exact = ask(text, "--vectors", vectors).out
    out, err = ask(text, "--vectors", vectors, "--index", index)
    # with as many probes as lists all is searched
    assert exact.splitlines()[0].split()[1:] == out.splitlines()[0].split()[1:] == ["d9", "T9"]
    assert "training IVF4,SQ8 on 200" in err if index == "IVF4,SQ8" else "training" not in err
    with monkeypatch.context() as patch:
        patch.setattr(faiss, "index_factory", None)  # what is kept is not made again
        assert ask(text, "--vectors", vectors, "--index", index) == (out, "")
    assert ask(text, "--vectors", vectors, "--index", "Flat").out == exact
    if index.startswith("IVF"):
        with pytest.raises(UserError, match="--search: 'nonsense=3' does not fit the index 'IVF4,SQ8'"):
            ask(text, "--vectors", vectors, "--index", index, "--search", "nonsense=3")


def test_an_index_of_other_vectors_is_made_again(ask, corpus, records):
    ask("red", "--corpus", corpus, "--index", "IVF4,SQ8")
    write_lines(corpus, records[:100])
    out, err = ask("red", "--corpus", corpus, "--index", "IVF4,SQ8", "--json")
    assert "training IVF4,SQ8 on 100 vectors" in err and max(one["row"] for one in json.loads(out)["results"]) < 100


def test_of_a_corpus_that_has_changed_the_ids_are_shown(ask, run, corpus, records):
    ask("red", "--corpus", corpus)
    (folder,) = run.glob("search-c-*")
    write_lines(corpus, records[:9])
    out, err = ask("red", "--vectors", folder, "--count", 2)
    assert "has changed since it was encoded; ids alone are shown" in err
    assert len(out.splitlines()) == 2 and out.split()[1].startswith("d")


def test_a_full_disk_is_one_line(ask, corpus, monkeypatch):
    write = nearest._write
    with monkeypatch.context() as patch:
        patch.setattr(nearest, "_write", lambda faiss, index, path: write(faiss, index, "/dev/full"))
        with pytest.raises(UserError, match=r"cannot write here \(No space left on device\); make room") as error:
            ask("red", "--corpus", corpus, "--index", "IVF4,Flat")
        assert "\n" not in str(error.value)
    assert ask("red", "--corpus", corpus, "--index", "IVF4,Flat").out


def test_vectors_of_other_weights_are_refused(ask, run, corpus):
    ask("red", "--corpus", corpus)
    (folder,) = run.glob("search-c-*")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"weights": "others"}))
    with pytest.raises(UserError, match="made with other weights than those of"):
        ask("red", "--vectors", folder)


def test_any_ranks_find_the_same(run, corpus, records, tmp_path):
    queries, found = write_lines(tmp_path / "q.jsonl", records[:20]), []
    options = ["--queries", queries, "--corpus", corpus, "--json", "--index", "IVF4,SQ8", "--search", "nprobe=4"]
    for start in ([sys.executable], [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]):
        for path in run.glob("search-c-*"):
            shutil.rmtree(path)
        command = list(map(str, [*start, "-m", "conan_engine.search", run, *options]))
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    assert found[0] == found[1] and found[0].count("\n") == 20


def test_queries_from_standard_input(run, corpus):
    done = subprocess.run(
        [sys.executable, "-m", "conan_engine.search", run, "--queries", "-", "--corpus", corpus, "--count", "2"],
        input="red bicycle\nprime root\n", capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert [line.strip() for line in lines if line and not line[0].isdigit()][::3][:1] == ["red bicycle"]
    assert done.stdout.count("  d") == 4 and "  prime root" in lines


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([""], "TEXT is empty"),
        (["  \n"], "TEXT is empty"),
        (["a", "--count", "0"], "--count is 0; expected at least 1"),
        (["a", "--queries", "q"], "expected either TEXT or --queries"),
        ([], "expected either TEXT or --queries"),
        (["a", "--dim", "33"], "--dim is 33; expected 1 to 32"),
        (["a", "--vectors", "v.npy", "--dim", "8"], "leave it out with --vectors"),
        (["a", "--vectors", "v.npy"], "v.npy: cannot read vectors from it"),
        (["a", "--corpus", "none.jsonl"], "none.jsonl: no such file"),
        (["a", "--queries=none.jsonl"], "expected either TEXT or --queries"),
        (["--queries=none.jsonl"], "none.jsonl: no such file"),
        (["a", "--index", "IVF2,Nothing"], "--index: faiss cannot make 'IVF2,Nothing' of 4 vectors of 32 numbers"),
    ],
)
def test_a_mistake_is_said(ask, arguments, said):
    with pytest.raises(UserError) as error:
        ask(*arguments)
    assert said in str(error.value) and "\n" not in str(error.value)


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


def test_a_bad_record_of_a_corpus_leaves_nothing_behind(ask, run, tmp_path):
    write_lines(tmp_path / "bad.jsonl", [{"text": "a"}, {"words": "b"}])
    with pytest.raises(UserError, match="bad.jsonl: line 2: found keys"):
        ask("a", "--corpus", tmp_path / "bad.jsonl")
    assert not list(run.glob("search-bad-*"))


def test_the_slices_of_an_index_do_not_change_it(ask, corpus, monkeypatch):
    monkeypatch.setattr(nearest, "SLICE", 50 * 32)
    out = ask("red", "--corpus", corpus, "--index", "IVF4,Flat", "--search", "nprobe=4").out
    assert out == ask("red", "--corpus", corpus).out
