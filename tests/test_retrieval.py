"""The numbers are trec_eval's, the search is exact however it is cut, and the files are BEIR's."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
import pytrec_eval
from runs import ROOT, write_lines

from conan_engine import evaluate, retrieval
from conan_engine.errors import UserError

rng = np.random.default_rng()


def test_the_numbers_are_those_of_trec_eval():
    names = [f"d{i}" for i in rng.permutation(400)]
    qrels = {f"q{q}": {str(d): int(rng.integers(1, 4)) for d in rng.choice(names, rng.integers(1, 130), replace=False)} for q in range(40)}
    scores = rng.integers(0, 60, (40, 400)) / 64  # many tie
    run = {f"q{q}": dict(zip(names, row.tolist())) for q, row in enumerate(scores)}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.20,100"}).evaluate(run)
    for query, right in qrels.items():
        ours = retrieval.measure(retrieval._in_order(run[query].items()), right)
        expected = [theirs[query][key] for key in ("ndcg_cut_10", "recall_20", "recall_100")]
        assert list(ours.values()) == pytest.approx(expected, abs=1e-9) and list(ours) == list(retrieval.METRICS)


@pytest.mark.parametrize(("documents", "block"), [(1000, 1000), (1000, 37), (150, 149), (7, 3), (1, 1)])
def test_a_search_in_blocks_finds_the_nearest_of_all(documents, block, monkeypatch):
    monkeypatch.setattr(retrieval, "QUERIES", 3)
    queries, vectors = (rng.standard_normal((n, 24)).astype(np.float32) for n in (10, documents))
    ids = [f"d{i}" for i in rng.permutation(documents)]
    found = retrieval.search(queries, ((ids[i : i + block], vectors[i : i + block]) for i in range(0, documents, block)))
    for query, best in zip(queries.astype(np.float64), found):
        exact = sorted(zip(ids, vectors @ query), key=lambda one: -one[1])[: retrieval.DEPTH]
        assert [score for _, score in best] == pytest.approx([score for _, score in exact], abs=1e-4)
        assert {name for name, _ in best[:50]} <= {name for name, _ in exact} and len(best) == len(exact)


def test_bm25_finds_what_has_the_words_and_nothing_else():
    found = retrieval.bm25(["green apples", "unheard"], [("a", "apples are red"), ("b", "green apples are green"), ("c", "nothing")])
    assert [name for name, _ in found[0]] == ["b", "a"] and found[1] == []


@pytest.fixture
def mine(tmp_path):
    """Queries in two languages that are copies of some of the documents, one without an answer, as BEIR lays files out."""
    words = [" ".join(rng.choice(["graph", "tree", "matrix", "root", "edge", "prime", "series", "limit", "node", "path"], 6)) for _ in range(120)]
    with gzip.open(tmp_path / "corpus.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"_id": f"d{i}", "title": f"T{i}", "text": text}) + "\n" for i, text in enumerate(words))
    about = lambda i: {"language": "de"} if i % 2 else {"metadata": {"language": "en"}}
    write_lines(tmp_path / "queries.jsonl", ({"_id": i, "text": f"T{i}\n{words[i]}", **about(i)} for i in range(21)))
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{i}\td{i}\t1\n{i}\td{i + 1}\t0\n" for i in range(20)))
    return tmp_path


def test_ones_own_files_are_searched_and_scored_by_language(mine, untrained_run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", str(untrained_run), "--queries", str(mine / "queries.jsonl"), "--corpus", str(mine / "corpus.jsonl.gz"), "--dim", "16"])
    monkeypatch.setattr(retrieval, "BLOCK", 50)
    evaluate.main()
    results = json.loads((untrained_run / "retrieval-queries.json").read_text())
    assert (results["queries"], results["documents"]) == (20, 120)
    # a copy is its own nearest; documents of the same tokens may tie
    assert results["recall@20"] == 1 and results["ndcg@10"] > 0.8 and results["bm25.ndcg@10"] > 0.8
    for metric in retrieval.METRICS:
        assert results[metric] == pytest.approx((results[f"de.{metric}"] + results[f"en.{metric}"]) / 2)
    shown = capsys.readouterr().out
    assert "average" in shown and "de" in shown and "20 queries, 120 documents" in shown


@pytest.mark.parametrize(("file", "text", "said"), [
    ("queries.jsonl", '{"_id": "q"}\n', "queries.jsonl: line 1: text is None; expected a text"),
    ("queries.jsonl", '{"text": "q"}\n', "queries.jsonl: line 1: _id is None"),
    ("queries.jsonl", '{"_id": "other", "text": "q"}\n', "test.tsv: names none of the 1 queries of"),
    ("corpus.jsonl", '{"_id": "d0", "text": "a"}\n{"_id": "d1"}\n', "corpus.jsonl: line 2: text is None"),
    ("corpus.jsonl", '{"_id": "other", "text": "a"}\n', "test.tsv: names none of the 1 documents of"),
    ("qrels/test.tsv", "1 d1 1\n", "test.tsv: line 1: found '1 d1 1'; expected query-id, corpus-id and a whole number"),
    ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n1\td1\t0\n", "test.tsv: no document is right for any query"),
])  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_in_one_line(mine, untrained_run, file, text, said):
    (mine / "corpus.jsonl").write_bytes(gzip.decompress((mine / "corpus.jsonl.gz").read_bytes()))
    (mine / file).write_text(text)
    with pytest.raises(UserError, match=said.replace("[", "\\[")):
        retrieval.evaluate(evaluate.Encoder.load(untrained_run), mine / "queries.jsonl", mine / "corpus.jsonl")


@pytest.mark.parametrize("options", [["--corpus", "c.jsonl"], ["--dim", "8"]])
def test_a_search_without_queries_is_one_line_and_exit_code_2(untrained_run, options):
    done = subprocess.run([sys.executable, "-m", "conan_engine.evaluate", str(untrained_run), *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.strip() == "error: --queries is missing: a search of your own needs queries and a corpus"
