"""Sources cut into units: every record once, wherever the cuts fall, and the same shards from any number of processes
and parts."""

import gzip
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import pytest
import zstandard
from runs import small_tokenizer, write_lines

from conan_engine.config import Pretrain, Supervised
from conan_engine.data import build, units
from conan_engine.data.sources import files, one_file, paths
from conan_engine.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def small_units(monkeypatch):
    """Of a few hundred bytes."""
    monkeypatch.setattr(paths, "UNIT", (500, 700))


def some_texts(chance, count):
    return [
        "".join(chance.choices(["question ", "answer\u2028", "é", "日本", "\\n", '"', ","], k=chance.randrange(40)))
        for _ in range(count)
    ]


def write(path, texts):
    kind = paths.unpacked(path)
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=7)
        return
    if kind == "csv":
        rows = ["text", *(f'''"{text.replace('"', '""')}"''' for text in texts)]
    else:
        rows = texts if kind == "txt" else [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    data = "".join(f"{row}\n" for row in rows).encode()
    path.write_bytes(
        gzip.compress(data) if path.suffix == ".gz" else zstandard.compress(data) if path.suffix == ".zst" else data
    )


@pytest.mark.parametrize(
    "name", ["x.jsonl", "x.txt", "x.jsonl.gz", "x.txt.zst", "x.csv", "x.csv.gz", "x.json", "x.parquet"]
)
def test_the_parts_of_a_file_are_the_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr(one_file.File, "STRIPE", 3)
    chance = random.Random()
    for count in (1, 2, chance.randrange(3, 200)):
        texts = [text or "x" for text in some_texts(chance, count)]  # an empty cell of a table would be none
        write(tmp_path / name, texts)
        for parts in (1, 2, 7, 64):
            read, where = [], []
            for part in range(parts):
                reader = files.Reader([paths.Piece(tmp_path / name, 1, part, parts)])
                for _, record in reader:
                    read.append(record["text"])
                    where.append(reader.where)
            assert sorted(read) == sorted(texts), (count, parts)
            kind, first = ("row", 1) if name.endswith("parquet") else ("line", 2 if "csv" in name else 1)
            assert {place for _, place in where} == {f"{kind} {first + i}" for i in range(count)}
            assert all(texts[int(place.split()[1]) - first] == text for text, (_, place) in zip(read, where))
            if name in ("x.jsonl", "x.txt"):
                assert read == texts  # ranges are in order


def test_what_cannot_be_used_is_at_its_line_in_the_whole_file(tmp_path):
    lines = ['{"text": "é"}'] * 100
    lines[60] = "{broken"
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    found = []
    for part in range(5):
        assert len(
            list(
                files.Reader(
                    [paths.Piece(tmp_path / "x.jsonl", 1, part, 5)], reject=lambda *what: found.append((part, *what))
                )
            )
        ) == (19 if part == 3 else 20)
    ((part, path, place, bad),) = found
    assert (part, path, place, bad.reason) == (3, tmp_path / "x.jsonl", "line 61", "broken JSON")


def test_units_depend_on_names_and_sizes(tmp_path, small_units):
    for name, size in (
        ("a.jsonl", 200),
        ("b.jsonl", 250),
        ("c.jsonl", 100),
        ("d.jsonl.gz", 1200),
        ("e.jsonl", 1600),
        ("f.jsonl", 0),
        ("g.parquet", 900),
    ):
        (tmp_path / name).write_bytes(b"x" * size)
    cut = [[(piece.path.name, piece.part, piece.parts) for piece in unit] for unit in paths.cut(tmp_path)]
    assert cut == [
        [("a.jsonl", 0, 1), ("b.jsonl", 0, 1)], [("c.jsonl", 0, 1), ("d.jsonl.gz", 0, 3)], [("d.jsonl.gz", 1, 3)],
        [("d.jsonl.gz", 2, 3)],
        [("e.jsonl", 0, 4)], [("e.jsonl", 1, 4)], [("e.jsonl", 2, 4)], [("e.jsonl", 3, 4), ("f.jsonl", 0, 1)],
        [("g.parquet", 0, 2)], [("g.parquet", 1, 2)],
    ]  # fmt: skip


@pytest.fixture
def corpus(tmp_path, small_units):
    """A folder of files of several kinds, and what they hold; a job's settings."""
    chance = random.Random()
    (tmp_path / "web").mkdir()
    everything = []
    for i in range(12):
        texts = some_texts(chance, chance.randrange(80))
        write(tmp_path / "web" / f"{i:02}.{chance.choice(['jsonl', 'jsonl.gz', 'txt', 'txt.zst'])}", texts)
        everything += texts
    return tmp_path, everything


def shards_in(folder, source, tokenizer, parts=1, **how):
    """Every file under a folder, made of a source for pretraining in so many parts, in any order."""
    order = random.sample(range(1, parts + 1), parts)
    for part in order:
        job = build.make_job(str(source), "pretrain", Pretrain(), tokenizer, folder)
        found = build.make_shards([job], tokenizer, part=(part, parts), **how)
        assert (job.folder in found) == (part == order[-1]), "whole with the last part alone"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_shards_from_any_number_of_processes_and_parts(corpus, tokenizer):
    folder, texts = corpus
    one = shards_in(folder / "one", folder / "web", tokenizer, processes=1)
    assert len([name for name in one if name.endswith(".tokens")]) > 5
    (manifest,) = (
        json.loads(data) for name, data in one.items() if name.count("/") == 1 and name.endswith("manifest.json")
    )
    assert manifest["records"] == len(texts)
    assert shards_in(folder / "three", folder / "web", tokenizer, processes=3) == one
    assert shards_in(folder / "parts", folder / "web", tokenizer, parts=3, processes=1) == one
    assert shards_in(folder / "again", folder / "web", tokenizer, parts=2, processes=2) == one


def test_a_broken_unit_is_said_and_the_others_are_finished(corpus, tokenizer, capsys):
    folder, _ = corpus
    (folder / "web/03a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (folder / "web/07a.jsonl").write_text('{"text": "fine"}\n{"txt": ""}\n' + '{"text": "fine"}\n' * 50)
    job = build.make_job(str(folder / "web"), "pretrain", Pretrain(), tokenizer, folder / "data")
    with pytest.raises(
        UserError, match=r"03a.jsonl: line 2: broken JSON .* \(2 of \d+ units failed; the others are finished\)"
    ):
        build.make_shards([job], tokenizer, 2)
    assert "07a.jsonl: line 2" in capsys.readouterr().err
    cut = job.units()
    unfinished = [cut[number] for number in range(len(cut)) if not job.finished(number)]
    assert len(unfinished) == 2 and all(
        any(piece.path.name in ("03a.jsonl", "07a.jsonl") for piece in pieces) for pieces in unfinished
    )
    assert not job.finished()


def test_what_is_finished_is_not_made_again(corpus, tokenizer, monkeypatch):
    folder, _ = corpus
    whole = shards_in(folder / "data", folder / "web", tokenizer, processes=1)
    job = build.make_job(str(folder / "web"), "pretrain", Pretrain(), tokenizer, folder / "data")
    gone = random.sample(range(len(job.units())), 2)
    for number in gone:  # as a killed process leaves them
        (job.unit(number) / "manifest.json").unlink()
        (job.unit(number) / "shard-00000.tokens").write_bytes(b"half")
    (job.folder / "manifest.json").unlink()
    made = []
    monkeypatch.setattr(
        units,
        "make",
        lambda tokenizer, job, number, *rest, make=units.make: (
            made.append(number) or make(tokenizer, job, number, *rest)
        ),
    )
    assert shards_in(folder / "data", folder / "web", tokenizer, processes=1) == whole
    assert sorted(made) == sorted(gone)


def test_two_at_one_unit_do_not_meet(corpus, tokenizer):
    """A part that is started again while its first start still runs."""
    folder, _ = corpus
    program = (
        "import sys, pickle; from conan_engine.data import units; "
        "units.make(*pickle.load(sys.stdin.buffer), print)"
    )  # fmt: skip
    job = build.make_job(str(folder / "web"), "pretrain", Pretrain(), tokenizer, folder / "data")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for _ in range(4)
    ]
    for process in processes:
        process.stdin.write(pickle.dumps((tokenizer, job, 2, job.units()[2])))
        process.stdin.close()
    assert [process.wait(60) for process in processes] == [0] * 4, processes[0].stderr.read()
    assert job.finished(2)


def test_files_of_two_kinds_are_one_line(tmp_path, tokenizer, small_units):
    for name, record in (("a", {"text": "x" * 600}), ("b", {"query": "q", "pos": ["x" * 600]})):
        write_lines(tmp_path / f"{name}.jsonl", [record])
    write_lines(tmp_path / "b.jsonl", [{"instruction": "q", "output": "x" * 600}])
    job = build.make_job(str(tmp_path), "pretrain", Pretrain(), tokenizer, tmp_path / "data")
    with pytest.raises(
        UserError,
        match=r"b.jsonl: holds instruction records, and .*a.jsonl text records; make each kind a source of its own",
    ):
        build.make_shards([job], tokenizer, 1)


def test_too_much_left_out_is_judged_over_all_units(tmp_path, tokenizer, small_units):
    good = [json.dumps({"query": f"question {i}", "pos": [f"answer {i}"]}) for i in range(200)]
    (tmp_path / "x.jsonl").write_text("\n".join([*good, *["{broken"] * 3]))
    for share, enough in ((0.02, True), (0.01, False)):
        job = build.make_job(
            str(tmp_path / "x.jsonl"), "supervised", Supervised(), tokenizer, tmp_path / f"data-{share}", share
        )
        if enough:
            assert len(build.make_shards([job], tokenizer, 2)[job.folder]) == 200
        else:
            with pytest.raises(UserError, match=r"3 of the first 203 records cannot be used \(3 broken JSON\)"):
                build.make_shards([job], tokenizer, 2)
        rows = [json.loads(line) for line in (tmp_path / f"data-{share}/rejected.jsonl").read_text().splitlines()]
        assert [row["line"] for row in rows] == [201, 202, 203]


@pytest.mark.parametrize("victim", ["worker", "all"])
def test_killed_and_started_again_it_goes_on(tmp_path, victim):
    texts = [{"text": f"question {i} " + "answer " * (i % 200)} for i in range(40_000)]
    (tmp_path / "web").mkdir()
    for i in range(5):
        write_lines(tmp_path / "web" / f"{i}.jsonl", texts[i::5])
    config = tmp_path / "c.toml"
    config.write_text(f"""
        stages = ["pretrain"]
        tokenizer.vocab_size = 300
        tokenizer.train_bytes = 100_000
        pretrain = {{ steps = 1, batch = 1, data = {{ "{tmp_path}/web" = 1 }} }}
    """)
    command = [sys.executable, "-m", "conan_engine.prepare", config, f"--out_dir={tmp_path / 'run'}", "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not list(tmp_path.glob("run/data/*/unit-*/manifest.json")) and time.monotonic() < until:
        time.sleep(0.02)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "loky"], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]) if victim == "worker" else process.pid, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "Traceback" not in err
    if victim == "worker":
        assert "error: one of 2 processes that prepare data was killed" in err and process.returncode == 2
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("run/data/*/unit-*/manifest.json")}
    assert finished and not list(tmp_path.glob("run/data/*/manifest.json"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "40,000" in done.stdout
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())


def test_a_reader_says_how_far_it_is(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": "x" * 1000}] * 500)
    write_lines(tmp_path / "b.jsonl", [{"text": "x" * 1000}] * 500)
    cut = [
        paths.Piece(tmp_path / "a.jsonl", (tmp_path / "a.jsonl").stat().st_size),
        paths.Piece(tmp_path / "b.jsonl", 250_000, 1, 2),
    ]
    reader = files.Reader(cut)
    behind = [reader.behind for _ in reader]
    assert behind == sorted(behind) and behind[499] > 450_000 and 700_000 < behind[-1] <= 770_000
