"""The translator against a real HTTP server on this machine, which answers from installed catalogues and misbehaves as
real ones do."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from runs import ROOT, write_lines
from translating import Server, known_messages

from conan_engine.data.sources import files
from conan_engine.errors import UserError
from conan_engine.evaluation import retrieval
from conan_engine.translation import queries
from conan_engine.translation.journal import Journal

SHARES = "en = 2\nde = 3\nfr = 2\nja = 2\nru = 1\n"


@pytest.fixture(scope="module")
def messages():
    return known_messages()


@pytest.fixture
def server(messages):
    server = Server(messages)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def asked(tmp_path, messages):
    """Records of queries that the server knows."""
    records = [
        {"query": english, "pos": [f"document {i}"], "neg": [f"other {i}"]}
        for i, english in enumerate(random.sample(sorted(messages), 120))
    ]
    write_lines(tmp_path / "queries.jsonl", records)
    (tmp_path / "shares.toml").write_text(SHARES)
    return records


def command(folder, server, *more):
    return [
        sys.executable,
        "-m",
        "conan_engine.translate",
        f"{folder}/queries.jsonl",
        f"{folder}/out.jsonl",
        "--endpoint",
        server.url,
        "--model",
        "mine",
        "--shares",
        f"{folder}/shares.toml",
        *more,
    ]


def run(folder, server, *more, key="secret-key"):
    return subprocess.run(
        command(folder, server, *more),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OPENAI_API_KEY": key},
        timeout=120,
    )


def chosen(records, seed=1):
    shares = {"en": 0.2, "de": 0.3, "fr": 0.2, "ja": 0.2, "ru": 0.1}
    return [queries.language_of(i, record["query"], seed, shares) for i, record in enumerate(records)]


def expected(records, messages):
    return [
        {**r, "query": r["query"] if language == "en" else messages[r["query"]][language], "language": language}
        for r, language in zip(records, chosen(records))
    ]


def test_true_translations_whatever_the_server_does_first(tmp_path, server, asked, messages):
    foreign = [record["query"] for record, language in zip(asked, chosen(asked)) if language != "en"]
    ways = ("429", "500", "slow", "broken", "html", "polite")
    server.first = dict(zip(foreign, ways * 4))
    done = run(tmp_path, server, "--timeout=1", "--requests=8")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines == expected(asked, messages)
    # all but the polite ones twice
    assert server.asked.keys() == set(foreign) and server.asked.total() == len(foreign) + 20
    assert 1 < server.most <= 8 and server.keys == {"Bearer secret-key"}
    for text in (done.stdout, done.stderr, *(path.read_text() for path in tmp_path.iterdir())):
        assert "secret-key" not in text
    assert f"{50 * len(foreign):,} prompt and {7 * len(foreign):,} completion tokens" in done.stdout
    assert {kind for kind, _ in files.read(tmp_path / "out.jsonl")} == {"pairs"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.jsonl",
        "out.rejected.jsonl",
        "queries.jsonl",
        "shares.toml",
    ]
    again = run(tmp_path, server)
    assert again.returncode == 2 and again.stderr.strip().endswith(
        "out.jsonl: exists already; remove it, or name another"
    )


def test_what_is_no_translation_is_rejected_with_its_reason(tmp_path, server, asked, messages):
    foreign = [
        record["query"]
        for record, language in zip(asked, chosen(asked))
        if language != "en" and 20 < len(record["query"]) < 60
    ]
    ways = {
        "garbage": "no JSON",
        "empty": "empty",
        "copy": "a copy of the source",
        "script": "another script",
        "cut off": "cut off",
        "null": "no JSON",
        "half": "half a character",
    }
    server.always = dict(zip(foreign, ways))
    done = run(tmp_path, server)
    assert done.returncode == 0, done.stderr
    rejected = [json.loads(line) for line in (tmp_path / "out.rejected.jsonl").read_text().splitlines()]
    assert {row["query"]: row["reason"] for row in rejected} == {
        query: ways[way] for query, way in server.always.items()
    }
    assert (
        "7 rejected: 1 a copy of the source, 1 another script, 1 cut off, 1 empty, 1 half a character, 2 no JSON"
        in done.stdout
    )
    kept = [one for record, one in zip(asked, expected(asked, messages)) if record["query"] not in server.always]
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == kept


def test_queries_to_evaluate_with_are_translated_where_they_stand(tmp_path, server, asked, messages):
    write_lines(
        tmp_path / "queries.jsonl",
        [{"_id": str(i), "text": record["query"], "metadata": {}} for i, record in enumerate(asked)],
    )
    done = run(tmp_path, server)
    assert done.returncode == 0, done.stderr
    found = retrieval.read_queries(tmp_path / "out.jsonl")
    assert found == [
        (str(i), record["query"], record["language"]) for i, record in enumerate(expected(asked, messages))
    ]


def test_what_holds_no_queries_is_told(tmp_path, server, messages):
    write_lines(tmp_path / "queries.jsonl", [{"text": "no id"}])
    (tmp_path / "shares.toml").write_text(SHARES)
    done = run(tmp_path, server)
    assert done.returncode == 2 and "queries.jsonl: holds other records; expected" in done.stderr.splitlines()[-1]


def test_killed_again_and_again_it_pays_for_nothing_twice(tmp_path, server, asked, messages):
    server.delay, kills = 0.02, 0
    while kills < 2:
        process = subprocess.Popen(
            command(tmp_path, server, "--requests=4"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
        )
        until = server.answered.total() + random.randint(3, 20)
        while server.answered.total() < until and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    with open(tmp_path / "out.journal", "ab") as file:
        file.write(b'{"number": 3, "langu')  # as a kill in the midst of a write leaves it
    assert not (tmp_path / "out.jsonl").exists()
    done = run(tmp_path, server, "--requests=4")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == expected(asked, messages)
    foreign = sum(language != "en" for language in chosen(asked))
    assert server.asked.total() <= foreign + kills * 4, "only what was under way at a kill is asked for again"


@pytest.mark.parametrize(
    ("way", "said"), [("401", 'HTTP 401 {"error": "no such key"}; '), ("500", "2 tries failed; the last: HTTP 500")]
)
def test_an_endpoint_that_does_not_answer_ends_it_and_keeps_the_rest(tmp_path, server, asked, messages, way, said):
    foreign = [record["query"] for record, language in zip(asked, chosen(asked)) if language != "en"]
    server.always = {foreign[40]: way}
    done = run(tmp_path, server, "--tries=2", "--requests=2")
    assert (
        done.returncode == 2
        and said in done.stderr.splitlines()[-1]
        and "queries are answered: run the same command again" in done.stderr
        and "Traceback" not in done.stderr
    )
    first = server.asked.copy()
    other = run(tmp_path, server, "--seed=2")
    assert other.returncode == 2 and "out.journal: belongs to another command (seed was 1, is 2)" in other.stderr
    server.always = {}
    assert run(tmp_path, server).returncode == 0
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == expected(asked, messages)
    assert {query for query in first if server.asked[query] > first[query]} <= {foreign[40]}


def test_nobody_there_is_one_line(tmp_path, asked, messages):
    server = Server(messages)
    server.shutdown()
    server.server_close()
    done = run(tmp_path, server, "--tries=1", key="")
    assert (
        done.returncode == 2
        and f"error: {server.url}/chat/completions: 1 tries failed; the last: " in done.stderr.splitlines()[-1]
    )


def test_languages_are_shared_out_by_seed(asked):
    many = [{"query": f"query {i}"} for i in range(20_000)]
    one, two = chosen(many), chosen(many, seed=2)
    assert one == chosen(many) and one != two
    for language, share in (("en", 0.2), ("de", 0.3), ("ru", 0.1)):
        assert one.count(language) / len(many) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(("answer", "found"), [
    ('{"translation": "a"}', "a"), ('{"x": {"translation": "b"}}', "b"),
    ('so { "translation" : "c \\" {d}" } and {"translation": "e"}', 'c " {d}'), ('{"translation": 3}', None),
    ("", None), ("{{{", None),
])  # fmt: skip
def test_a_translation_is_found_in_what_is_around_it(answer, found):
    assert queries.translation_in(answer) == found


def test_two_at_once_do_not_write_one_journal(tmp_path):
    facts = {"queries": "q", "bytes": 1, "model": "m", "seed": 1, "shares": {"de": 1.0}}
    first = Journal(tmp_path / "x.journal", facts)
    with pytest.raises(UserError, match="x.journal: another process is writing here"):
        Journal(tmp_path / "x.journal", facts)
    first.file.close()
    assert Journal(tmp_path / "x.journal", facts).places == {}
