"""Encoding a corpus: the same file for any ranks, parts, readers and stops; what is kept, and what is not."""

import csv
import gzip
import json
import multiprocessing
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from runs import write_lines

from conan_engine.data.tokenizer import Tokenizer
from conan_engine.errors import UserError
from conan_engine.vectors import corpus as corpora
from conan_engine.vectors import windows
from conan_engine.vectors.corpus import Corpus
from conan_engine.vectors.making import Making, Share
from conan_engine.vectors.quantize import quantize, ranges_of, stored_as
from conan_engine.vectors.store import Store
from conan_engine.vectors.windows import Reading

WIDTH, ALONE = 5, Share()


@pytest.fixture
def few_bytes(monkeypatch):
    """Many units, of few documents."""
    monkeypatch.setattr(corpora, "UNIT", 2000)
    monkeypatch.setattr(windows, "SMALL", 0)


@pytest.fixture
def texts(chance):
    return [
        " ".join(chance.choice(["a", "few", "words", "ünïcode", "中文"], length))
        for length in chance.integers(0, 30, 400)
    ]


@pytest.fixture
def chance():
    return np.random.default_rng(7)


def embed(tokens, cu_seqlens):
    """A vector that says which tokens there were, and how many."""
    rows = [tokens[start:end].astype(np.float64) for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:])]
    return np.array([[len(row), row.sum(), *np.resize(row[:3] if len(row) else [0], 3)] for row in rows], np.float32)


class Stopped(Exception):
    pass


def stopping(calls):
    """`embed` that fails after so many calls, as if the process were killed then."""
    left = iter(range(calls))

    def some(tokens, cu_seqlens):
        if next(left, None) is None:
            raise Stopped
        return embed(tokens, cu_seqlens)

    return some


def making(source, out, tokenizer, share=ALONE, embed=embed, precision="float32", ranges=None, rows=7):
    reading = Reading(Corpus(str(source), str(source)), tokenizer, 16, rows)
    return Making(reading, Store(out, *stored_as(precision, WIDTH)), share, embed, precision, ranges)


def make(source, out, tokenizer, about=None, **how):
    return making(source, out, tokenizer, **how).run(about or {"source": str(source)})


def expected(texts, tokenizer):
    return embed(*windows.packed(tokenizer.encode_texts(texts, 16)))


def parts_of(folder):
    index = json.loads((folder / "index.json").read_text())
    found = [np.load(folder / part["file"]) for part in index["parts"]]
    assert [len(part) for part in found] == [part["count"] for part in index["parts"]]
    return index, np.concatenate(found)


@pytest.fixture(scope="module")
def tokenizer(untrained_run):
    return Tokenizer.load(Tokenizer.of(untrained_run))


@pytest.mark.usefixtures("few_bytes")
@pytest.mark.parametrize("processes", [0, 3])
@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "csv", "parquet", "folder"])
def test_row_i_is_record_i(tmp_path, tokenizer, texts, processes, form):
    texts = [text or "-" for text in texts] if form == "csv" else texts  # where an empty cell is none
    source = corpus_of(form, tmp_path, texts)
    said = make(source, tmp_path / "out.npy", tokenizer, share=Share(processes=processes))
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected(texts, tokenizer))
    ids = [json.loads(line) for line in (tmp_path / "out.ids.jsonl").read_text(encoding="utf-8").splitlines()]
    assert ids == [f"d{i}\n" for i in range(len(texts))]
    assert said[-1] == f"{tmp_path}/out.npy: float32 [{len(texts)}, {WIDTH}]"
    assert not list(tmp_path.glob("*.partial"))


def corpus_of(form, folder, texts):
    records = [{"_id": f"d{i}\n", "text": text} for i, text in enumerate(texts)]
    if form == "folder":
        (folder / "in").mkdir()
        for number in range(9):
            write_lines(folder / f"in/{number}.jsonl", records[number * 50 : (number + 1) * 50])
        return folder / "in"
    if form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.Table.from_pylist(records), folder / "in.parquet", row_group_size=30)
        return folder / "in.parquet"
    if form == "csv":
        with open(folder / "in.csv", "w", newline="", encoding="utf-8") as file:
            rows = csv.DictWriter(file, ["_id", "text"])
            rows.writeheader()
            rows.writerows(records)
        return folder / "in.csv"
    path = write_lines(folder / "in.jsonl", records)
    if form == "jsonl.gz":
        path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        return path.with_suffix(".jsonl.gz")
    return path


@pytest.mark.usefixtures("few_bytes")
@pytest.mark.parametrize("out", ["out.npy", "out"])
@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_the_bytes_are_the_same_for_any_ranks_and_stops(tmp_path, tokenizer, texts, out, precision):
    source = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    assert len(Corpus(str(source), "").units()) > 8
    (tmp_path / "whole").mkdir()
    make(source, tmp_path / "whole" / out, tokenizer, precision=precision)
    context = multiprocessing.get_context("fork")
    for kill_after in (2, 5, None):  # windows of each rank, the third time to the end
        given = source, tmp_path / out, tokenizer, precision, kill_after
        ranks = [context.Process(target=_rank, args=(*given, Share(rank, 3))) for rank in range(3)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(60)
            assert rank.exitcode == (0 if kill_after is None else 9)
        assert (tmp_path / out).is_file() == (out == "out.npy" and kill_after is None)
        assert (tmp_path / out / "index.json").exists() == (out == "out" and kill_after is None)
    for path in (tmp_path / "whole").rglob("*.npy"):
        assert (tmp_path / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def _rank(source, out, tokenizer, precision, kill_after, share):
    try:
        make(
            source, out, tokenizer, share=share, precision=precision,
            embed=embed if kill_after is None else stopping(kill_after + (precision == "int8" and share.rank == 0)),
        )  # fmt: skip
    except Stopped:
        os._exit(9)


@pytest.mark.usefixtures("few_bytes")
def test_what_is_finished_is_not_embedded_again(tmp_path, tokenizer, texts):
    source = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    windows_in_all = -(-len(texts) // 7)
    with pytest.raises(Stopped):
        make(source, tmp_path / "out.npy", tokenizer, embed=stopping(windows_in_all // 2))
    seen = []

    def noting(tokens, cu_seqlens):
        seen.append(len(cu_seqlens) - 1)
        return embed(tokens, cu_seqlens)

    make(source, tmp_path / "out.npy", tokenizer, embed=noting)
    assert 0 < sum(seen) <= len(texts) - 7 * (windows_in_all // 2 - 9)  # units end with smaller windows
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected(texts, tokenizer))


@pytest.mark.usefixtures("few_bytes")
def test_parts_in_any_order_and_the_last_completes(tmp_path, tokenizer, texts):
    source = write_lines(tmp_path / "in.jsonl", [{"_id": i, "text": text} for i, text in enumerate(texts)])
    for part in (2, 0):
        assert make(source, tmp_path / "out", tokenizer, share=Share(part=part, parts=3)) == []
    assert not (tmp_path / "out/index.json").exists()
    assert make(source, tmp_path / "out", tokenizer, share=Share(part=1, parts=3))
    index, found = parts_of(tmp_path / "out")
    np.testing.assert_array_equal(found, expected(texts, tokenizer))
    assert index["count"] == len(texts) and (tmp_path / "out" / index["ids"]).read_text().split() == [
        f'"{i}"' for i in range(len(texts))
    ]
    store = Store(tmp_path / "out", "float32", WIDTH)
    assert store.complete({"source": str(source)}) == len(texts)
    with pytest.raises(UserError, match="holds the vectors of other files"):
        store.complete({"source": "other"})


def test_other_settings_begin_again_but_not_beside_other_parts(tmp_path, tokenizer, texts, capsys):
    source = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    with pytest.raises(Stopped):
        make(source, tmp_path / "out", tokenizer, {"source": "x", "dim": 5}, embed=stopping(3))
    with pytest.raises(UserError, match="unfinished encoding of 'x' with other files or settings; remove it"):
        make(source, tmp_path / "out", tokenizer, {"source": "x", "dim": 4}, share=Share(part=0, parts=2))
    make(source, tmp_path / "out", tokenizer, {"source": "x", "dim": 4})
    assert "this one begins again" in capsys.readouterr().out
    np.testing.assert_array_equal(parts_of(tmp_path / "out")[1], expected(texts, tokenizer))


def test_int8_takes_its_ranges_from_a_sample(tmp_path, tokenizer, texts, monkeypatch, few_bytes):
    monkeypatch.setattr("conan_engine.vectors.making.SAMPLE", 50)
    source = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    make(source, tmp_path / "out.npy", tokenizer, precision="int8")
    units, first, sample = Corpus(str(source), "").units(), 0, []
    reading = Corpus(str(source), "")
    for pieces in units:
        of_unit = [document.text for document in reading.documents(pieces)]
        assert of_unit == texts[first : first + len(of_unit)]
        sample += of_unit[: -(-50 // len(units))]
        first += len(of_unit)
    ranges = ranges_of(expected(sample, tokenizer))
    np.testing.assert_array_equal(np.load(tmp_path / "out.ranges.npy"), ranges)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), quantize(expected(texts, tokenizer), "int8", ranges))


def test_some_without_an_id_leave_no_ids(tmp_path, tokenizer):
    source = write_lines(tmp_path / "in.jsonl", [{"_id": "a", "text": "x"}, {"text": "y"}])
    (tmp_path / "out.ids.jsonl").write_text("of another corpus")
    said = make(source, tmp_path / "out.npy", tokenizer)
    assert said[0].endswith("1 of 2 records have no _id, so no ids are written")
    assert not (tmp_path / "out.ids.jsonl").exists()


@pytest.mark.parametrize("dim", [5, 4])
def test_a_second_command_leaves_the_first_alone(tmp_path, tokenizer, texts, dim):
    source = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts])

    def meanwhile(tokens, cu_seqlens):
        with pytest.raises(UserError, match="another process encodes into it"):
            make(source, tmp_path / "out.npy", tokenizer, {"dim": dim})
        return embed(tokens, cu_seqlens)

    make(source, tmp_path / "out.npy", tokenizer, {"dim": 5}, embed=meanwhile)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected(texts, tokenizer))


def test_a_full_disk_is_found_before_the_work(tmp_path, tokenizer, texts, monkeypatch):
    source = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(UserError, match=r"400 vectors need 0.0 GB, and its disk has 0.0 GB free"):
        make(source, tmp_path / "out.npy", tokenizer)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.usefixtures("few_bytes")
def test_a_reader_that_is_killed(tmp_path, tokenizer, texts, monkeypatch):
    source = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    reading = Reading(Corpus(str(source), str(source)), tokenizer, 16, 7)
    tasks = [windows.Task(unit, pieces, 0) for unit, pieces in enumerate(reading.corpus.units())]
    found = windows.read(reading, tasks, 2)
    next(found)
    children = [int(child) for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    killed = [child for child in children if b"popen_loky" in Path(f"/proc/{child}/cmdline").read_bytes()]
    for child in killed:
        os.kill(child, signal.SIGKILL)
    with pytest.raises(UserError, match="processes that read the corpus was killed"):
        list(found)


@pytest.mark.parametrize("out", ["out.npy", "out"])
@pytest.mark.parametrize("early", [False, True])
def test_a_rank_that_comes_when_the_others_have_ended_ends_too(tmp_path, tokenizer, texts, out, early):
    """It has no unit of its own, and finds the folder complete: before it looks, or (early) just after."""
    source = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts[:20]])
    about = {"source": str(source)}
    making(source, tmp_path / out, tokenizer, share=Share(0, 2)).run(about)
    late = making(source, tmp_path / out, tokenizer, share=Share(1, 2))
    if early:
        late.store.wait = lambda about: True
    assert late.run(about) == [] and not list(tmp_path.rglob("*.partial"))


def test_a_rank_that_waits_hears_that_the_others_have_ended(tmp_path, tokenizer, texts):
    source = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts[:20]])
    store = making(source, tmp_path / "out.npy", tokenizer).store
    store.begin({"source": "x"}, True)
    thread = threading.Timer(0.3, lambda: shutil.rmtree(store.work))
    thread.start()
    with pytest.raises(OSError, match="is gone"):
        store.counted(0)


def test_a_folder_that_is_removed_under_a_rank_is_one_line(tmp_path, tokenizer, texts):
    source = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts[:20]])
    late = making(source, tmp_path / "out.npy", tokenizer, share=Share(1, 2))
    late.store.wait = lambda about: True
    with pytest.raises(UserError, match="out.npy: cannot write it"):
        late.run({"source": str(source)})
