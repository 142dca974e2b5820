"""The numbers are trec_eval's, the search is exact however it is cut, and the files are BEIR's."""

import gzip
import json
import shutil
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import pytrec_eval
import torch
from runs import ROOT, write_lines

from conan_engine import evaluate
from conan_engine.errors import UserError
from conan_engine.evaluation import retrieval
from conan_engine.vectors import nearest
from conan_engine.vectors.windows import Reading

rng = np.random.default_rng()


def test_the_numbers_are_those_of_trec_eval():
    names = [f"d{i}" for i in rng.permutation(400)]
    qrels = {
        f"q{q}": {str(d): int(rng.integers(1, 4)) for d in rng.choice(names, rng.integers(1, 130), replace=False)}
        for q in range(40)
    }
    scores = rng.integers(0, 60, (40, 400)) / 64  # many tie
    run = {f"q{q}": dict(zip(names, row.tolist())) for q, row in enumerate(scores)}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.20,100"}).evaluate(run)
    for query, right in qrels.items():
        ours = retrieval.measure(retrieval._in_order(run[query].items()), right)
        expected = [theirs[query][key] for key in ("ndcg_cut_10", "recall_20", "recall_100")]
        assert list(ours.values()) == pytest.approx(expected, abs=1e-9) and list(ours) == list(retrieval.METRICS)


@pytest.mark.parametrize(("documents", "block"), [(1000, 1000), (1000, 37), (150, 149), (7, 3), (1, 1)])
def test_a_search_in_blocks_finds_the_nearest_of_all(documents, block, monkeypatch):
    monkeypatch.setattr(nearest, "SCORES", 3 * block)
    queries, vectors = (rng.standard_normal((n, 24)).astype(np.float32) for n in (10, documents))
    numbers = rng.permutation(documents)
    found = retrieval.search(
        queries, ((numbers[i : i + block], vectors[i : i + block]) for i in range(0, documents, block))
    )
    for query, scores, best in zip(queries.astype(np.float64), *found):
        exact = sorted(zip(numbers, vectors @ query), key=lambda one: -one[1])[: retrieval.DEPTH + 1]
        assert scores.tolist() == pytest.approx([score for _, score in exact], abs=1e-4)
        assert {*best[:50]} <= {number for number, _ in exact} and len(best) == len(exact)


def test_bm25_finds_what_has_the_words_and_nothing_else():
    found = retrieval.bm25(
        ["green apples", "unheard"], [("a", "apples are red"), ("b", "green apples are green"), ("c", "nothing")]
    )
    assert [name for name, _ in found[0]] == ["b", "a"] and found[1] == []


@pytest.fixture
def mine(tmp_path):
    """Queries in two languages that are copies of some of the documents, one without an answer, as BEIR lays files
    out."""
    words = [
        " ".join(rng.choice(["graph", "tree", "matrix", "root", "edge", "prime", "series", "limit", "node", "path"], 6))
        for _ in range(120)
    ]
    with gzip.open(tmp_path / "corpus.jsonl.gz", "wt") as file:
        file.writelines(
            json.dumps({"_id": f"d{i}", "title": f"T{i}", "text": text}) + "\n" for i, text in enumerate(words)
        )
    about = lambda i: {"language": "de"} if i % 2 else {"metadata": {"language": "en"}}
    write_lines(tmp_path / "queries.jsonl", ({"_id": i, "text": f"T{i}\n{words[i]}", **about(i)} for i in range(21)))
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"{i}\td{i}\t1\n{i}\td{i + 1}\t0\n" for i in range(20))
    )
    return tmp_path


def test_ones_own_files_are_searched_and_scored_by_language(mine, untrained_run, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "evaluate",
            str(untrained_run),
            "--queries",
            str(mine / "queries.jsonl"),
            "--corpus",
            str(mine / "corpus.jsonl.gz"),
            "--dim",
            "16",
        ],
    )
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


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("queries.jsonl", '{"_id": "q"}\n', "queries.jsonl: line 1: text is None; expected a text"),
        ("queries.jsonl", '{"text": "q"}\n', "queries.jsonl: line 1: _id is None"),
        ("queries.jsonl", '{"_id": "other", "text": "q"}\n', "test.tsv: names none of the 1 queries of"),
        (
            "corpus.jsonl",
            '{"_id": "d0", "text": "a"}\n{"_id": "d1"}\n',
            "corpus.jsonl: line 2: found keys ['_id']; expected",
        ),
        ("corpus.jsonl", '{"_id": "other", "text": "a"}\n', "test.tsv: names none of the 1 documents of"),
        (
            "qrels/test.tsv",
            "1 d1\n",
            "test.tsv: line 1: found '1 d1'; expected query-id, corpus-id and a score, or TREC's",
        ),
        (
            "qrels/test.tsv",
            "1 d1 1\n1 d2 nan\n",
            "test.tsv: line 2: found '1 d2 nan'; expected query-id, corpus-id and a score",
        ),
        ("qrels/test.tsv", "1 0 d1 1 run\n", "test.tsv: line 1: found '1 0 d1 1 run'"),
        (
            "corpus.jsonl",
            '{"_id": "d0", "text": "a"}\n{"_id": "d0", "text": "b"}\n',
            "corpus.jsonl: line 2: _id 'd0' occurs a second time",
        ),
        (
            "queries.jsonl",
            '{"_id": 1, "text": "a"}\n{"_id": "1", "text": "b"}\n',
            "queries.jsonl: line 2: _id '1' occurs a second time",
        ),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n1\td1\t0\n", "test.tsv: no document is right for any query"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(mine, untrained_run, file, text, said):
    (mine / "corpus.jsonl").write_bytes(gzip.decompress((mine / "corpus.jsonl.gz").read_bytes()))
    (mine / file).write_text(text)
    with pytest.raises(UserError, match=said.replace("[", "\\[")):
        retrieval.evaluate(evaluate.Encoder.load(untrained_run), mine / "queries.jsonl", mine / "corpus.jsonl")


@pytest.mark.parametrize(
    "text",
    [
        "query-id\tcorpus-id\tscore\nq 1\td1\t2\nq2\td3\t1\nq2\td4\t0\n",
        "qid\titer\tdocid\trel\r\nq 1\t0\td1\t2\r\n\r\nq2\t0\td3\t1.0\r\nq2\t0\td4\t-1\r\n",
        "q 1\tQ0\td1\t2.0\nq2\tQ0\td3\t1\n",
    ],
)
def test_judgments_in_three_columns_or_trecs_four(tmp_path, text):
    (tmp_path / "qrels.tsv").write_bytes(text.encode())
    assert retrieval.read_qrels(tmp_path / "qrels.tsv") == {"q 1": {"d1": 2}, "q2": {"d3": 1}}
    (tmp_path / "qrels.txt").write_bytes(text.replace("q 1", "q1").replace("\t", "  ").encode())
    assert retrieval.read_qrels(tmp_path / "qrels.txt") == {"q1": {"d1": 2}, "q2": {"d3": 1}}
    (tmp_path / "graded.tsv").write_text("q\td\t0.5\n")
    assert retrieval.read_qrels(tmp_path / "graded.tsv") == {"q": {"d": 0.5}}


def own_files(folder, queries, documents, qrels):
    write_lines(folder / "q.jsonl", ({"_id": name, "text": text} for name, text in queries.items()))
    write_lines(folder / "c.jsonl", ({"_id": name, "text": text} for name, text in documents.items()))
    (folder / "r.tsv").write_text(
        "".join(f"{query} 0 {document} {score}\n" for query, of in qrels.items() for document, score in of.items())
    )
    return folder / "q.jsonl", folder / "c.jsonl", folder / "r.tsv"


class Fixed:
    """An encoder whose vectors are drawn by the text."""

    device = torch.device("cpu")
    tokenizer = SimpleNamespace(encode_texts=lambda texts, most: [[zlib.crc32(text.encode()) >> 1] for text in texts])

    def reading(self, corpus):
        return Reading(corpus, self.tokenizer, 8, 50)

    def windows(self, dim):
        return lambda tokens, cu_seqlens: self.drawn(tokens)

    def drawn(self, tokens):
        drawn = np.stack([np.random.default_rng(token).standard_normal(16) for token in tokens])
        return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)

    def encode(self, texts, dim=None):
        return self.drawn([token for (token,) in self.tokenizer.encode_texts(texts, 8)])


@pytest.mark.parametrize("ignore", [True, False, None])
def test_a_query_that_is_a_document_is_left_out_by_beirs_rule(tmp_path, ignore, capsys):
    """The numbers beside pytrec_eval's of what BEIR hands to it: with ignore_identical_ids, results without the query's
    own id."""
    texts = [f"text {i} of {rng.integers(1000)}" for i in range(300)]
    documents = {f"d{i}": text for i, text in enumerate(texts)}
    queries = {**{f"d{i}": texts[i] for i in range(0, 60, 2)}, **{f"q{i}": f"{texts[i]} too" for i in range(20)}}
    qrels = {
        query: {
            f"d{d}": int(rng.integers(1, 4))
            for d in rng.choice(300, rng.integers(1, 30), replace=False)
            if f"d{d}" != query
        }
        or {"d299": 1}
        for query in queries
    }
    qrels["d0"]["d0"] = 1  # for once it is right
    results = retrieval.evaluate(Fixed(), *own_files(tmp_path, queries, documents, qrels), ignore_identical_ids=ignore)
    scores = Fixed().encode(list(queries.values())) @ Fixed().encode(texts).T
    found = {query: {name: float(score) for name, score in zip(documents, row)} for query, row in zip(queries, scores)}
    for query in queries:
        if ignore or (ignore is None and query not in qrels[query]):
            found[query].pop(query, None)
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.20,100"}).evaluate(found)
    for ours, key in zip(retrieval.METRICS, ("ndcg_cut_10", "recall_20", "recall_100")):
        assert results[ours] == pytest.approx(np.mean([theirs[query][key] for query in queries]), abs=1e-6)
    said = (
        "29 queries have the id of a document, such as 'd10': it is left out for them, "
        "as BEIR does; --ignore_identical_ids=false counts it"
    )
    assert (said in capsys.readouterr().out) == (ignore is None)


def test_what_does_not_belong_together_is_counted_and_said(tmp_path, capsys):
    files = own_files(
        tmp_path,
        {"a": "one", "b": "two"},
        {"x": "one", "y": "two"},
        {"a": {"x": 1, "gone": 1, "away": 2}, "b": {"y": 1}, "nobody": {"x": 1}, "never": {"x": 1}},
    )
    results = retrieval.evaluate(Fixed(), *files)
    shown = capsys.readouterr().out
    assert (results["queries"], results["documents"], results["missing_documents"], results["missing_queries"]) == (
        2,
        2,
        2,
        2,
    )
    assert (
        "2 of the 4 documents that it judges are not in" in shown
        and "such as 'away'; they count as not found" in shown
        and "2 of the 4 queries that it judges are not in" in shown
    )
    assert results["recall@100"] == pytest.approx((1 / 3 + 1) / 2)


@pytest.mark.parametrize("options", [["--corpus", "c.jsonl"], ["--dim", "8"]])
def test_a_search_without_queries_is_one_line_and_exit_code_2(untrained_run, options):
    done = subprocess.run(
        [sys.executable, "-m", "conan_engine.evaluate", str(untrained_run), *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (
        done.returncode == 2
        and done.stderr.strip() == "error: --queries is missing; your own data needs both --queries and --corpus"
    )


SMALL_UNITS = """
from conan_engine import command, evaluate
from conan_engine.vectors import corpus
corpus.UNIT = 1
command.run(evaluate.main)
"""


def test_any_ranks_find_the_same(mine, untrained_run):
    lines = gzip.decompress((mine / "corpus.jsonl.gz").read_bytes()).splitlines(keepends=True)
    (mine / "corpus").mkdir()
    for part in range(3):  # each file is a unit
        (mine / f"corpus/{part}.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[part * 40 : part * 40 + 40])))
    (mine / "small.py").write_text(SMALL_UNITS)
    files = ["--queries", mine / "queries.jsonl", "--corpus", mine / "corpus", "--qrels", mine / "qrels/test.tsv"]
    run, results = shutil.copytree(untrained_run, mine / "run"), []
    for start in ([sys.executable], [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]):
        command = list(map(str, [*start, mine / "small.py", run, *files]))
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert done.returncode == 0 and done.stdout.count("written to") == 1, done.stderr
        results.append(json.loads((run / "retrieval-queries.json").read_text()))
        (run / "retrieval-queries.json").unlink()
        results[-1].pop("seconds.evaluate")
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():  # documents of the same tokens may tie
        assert results[1][key] == pytest.approx(value, abs=1e-6 if "bm25" in key else 0.05), key
