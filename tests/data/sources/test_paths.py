"""A source of many files: which, in which order, and what of it cannot be."""

import gzip
import json
import random

import pytest
import zstandard
from runs import shards_of, small_tokenizer, write_lines

from conan_engine.config import Pretrain
from conan_engine.data import build
from conan_engine.data.sources import files, paths
from conan_engine.errors import UserError


@pytest.fixture
def many(tmp_path):
    """Files in folders, written in no order, of numbered texts in the order of their names."""
    names = ["a.jsonl", "b/1.jsonl.gz", "b/10.txt", "b/2.jsonl.zst", "c/deep/er/x.csv"]
    lines = {name: [f"text {i} of {name}" for i in range(3)] for name in names}
    for name in random.sample(names, len(names)):
        path = tmp_path / "web" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = paths.unpacked(path)
        rows = (
            ["text", *lines[name]]
            if kind == "csv"
            else lines[name]
            if kind == "txt"
            else [json.dumps({"text": text}) for text in lines[name]]
        )
        data = "".join(f"{row}\n" for row in rows).encode()
        path.write_bytes(
            gzip.compress(data) if path.suffix == ".gz" else zstandard.compress(data) if path.suffix == ".zst" else data
        )
    for name in ("_SUCCESS", ".hidden.jsonl", "_temporary/part.json", "README.md"):
        path = tmp_path / "web" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not one of them\n")
    return tmp_path, lines


def texts(source):
    return [record["text"] for _, record in files.read(source)]


def test_a_folder_is_read_by_name(many):
    folder, lines = many
    assert texts(folder / "web") == sum(lines.values(), [])


@pytest.mark.parametrize(("pattern", "names"), [
    ("web/b/*", ["b/1.jsonl.gz", "b/10.txt", "b/2.jsonl.zst"]),
    ("web/**/*.jsonl*", ["a.jsonl", "b/1.jsonl.gz", "b/2.jsonl.zst"]), ("web/[ac]*/**/x.???", ["c/deep/er/x.csv"]),
])  # fmt: skip
def test_a_pattern_names_files(many, pattern, names):
    folder, lines = many
    assert texts(f"{folder}/{pattern}") == sum((lines[name] for name in names), [])


def test_a_list_has_an_order_of_its_own(many):
    folder, lines = many
    (folder / "mine.list").write_text("# the best first\nweb/c\n\nweb/b/*.gz\nweb/a.jsonl\n")
    assert texts(folder / "mine.list") == lines["c/deep/er/x.csv"] + lines["b/1.jsonl.gz"] + lines["a.jsonl"]


def test_a_file_may_have_the_signs_of_a_pattern_in_its_name(tmp_path):
    write_lines(tmp_path / "a[1].jsonl", [{"text": "x"}])
    assert texts(tmp_path / "a[1].jsonl") == ["x"]


@pytest.mark.parametrize(("source", "said"), [
    ("web/*.parquet", "web/.*: no file matches this pattern; check it"),
    ("web/absent", "absent: no such file, nor the name of a built-in source; check the path"),
    ("empty", "empty: this folder has no file that ends in .jsonl, .csv"),
    ("none.list", "none.list: names no file; write one path a line"),
    ("wrong.list", r"wrong.list: line 2: .*b/\*.xml: no file matches this pattern"),
    ("round.list", "round.list: line 1: .*lists that name each other"),
    ("kinds", "kinds/b.jsonl: holds sts records, and .*kinds/a.jsonl text records; make each kind a source of its own"),
    ("broken", "broken/b.jsonl: line 2: broken JSON"),
    ("blank", "blank: holds no records that can be used"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(many, source, said):
    folder, _ = many
    good, pair = '{"text": "a"}\n', '{"sentence1": "a", "sentence2": "b", "score": 1}\n'
    made = {
        "empty/x.md": "",
        "none.list": "# nothing\n",
        "wrong.list": "web/a.jsonl\nweb/b/*.xml\n",
        "round.list": "round.list\n",
        "blank/a.jsonl": "\n",
        "blank/b.jsonl": "",
    }
    made |= {"kinds/a.jsonl": good, "kinds/b.jsonl": pair, "broken/a.jsonl": good, "broken/b.jsonl": good + "{\n"}
    for name, text in made.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=said) as error:
        texts(folder / source)
    assert "\n" not in str(error.value)


def test_a_part_without_records_is_no_mistake(tmp_path):
    write_lines(tmp_path / "part-1.jsonl", [{"text": "x"}])
    (tmp_path / "part-0.jsonl").touch()
    assert texts(tmp_path) == ["x"]


def test_zstd_in_several_frames_of_any_size_is_read_whole(tmp_path):
    lines = [f'{{"text": "{i} {random.random()}"}}\n' for i in range(20_000)]
    parts = "".join(lines[:7]), "", "".join(lines[7:15_000]), "".join(lines[15_000:])
    whole = b"".join(
        zstandard.ZstdCompressor(write_content_size=i % 2 == 0).compress(part.encode()) for i, part in enumerate(parts)
    )
    (tmp_path / "x.jsonl.zst").write_bytes(whole)
    assert texts(tmp_path / "x.jsonl.zst") == [json.loads(line)["text"] for line in lines]
    for name, data in (
        ("cut", whole[:-30]),
        ("damaged", whole[:5000] + b"\0" * 100 + whole[5100:]),
        ("plain", b'{"text": "a"}\n'),
    ):
        (tmp_path / f"{name}.jsonl.zst").write_bytes(data)
        with pytest.raises(UserError, match=f"{name}.jsonl.zst: damaged or cut-off zstd file"):
            texts(tmp_path / f"{name}.jsonl.zst")


def test_what_is_left_out_is_listed_by_file(tmp_path):
    (tmp_path / "web").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"web/{name}.jsonl").write_text('{"text": "question"}\n{broken\n' + '{"text": "answer"}\n' * 9)
    for _ in range(2):  # what the first start wrote is not there twice
        assert (
            len(shards_of(tmp_path / "web", "pretrain", Pretrain(), small_tokenizer(tmp_path), tmp_path / "data", 0.2))
            == 20
        )
    rows = [json.loads(line) for line in (tmp_path / "data/rejected.jsonl").read_text().splitlines()]
    assert [(row["source"], row["file"], row["line"]) for row in rows] == [
        (f"{tmp_path}/web", f"{tmp_path}/web/{name}.jsonl", 2) for name in ("a", "b")
    ]


def test_another_file_makes_other_shards(tmp_path):
    tokenizer, stage = small_tokenizer(tmp_path), Pretrain()
    (tmp_path / "web").mkdir()
    write_lines(tmp_path / "web/a.jsonl", [{"text": "x"}])
    key = lambda: build.make_job(str(tmp_path / "web"), "pretrain", stage, tokenizer, tmp_path).folder
    first = key()
    assert key() == first
    write_lines(tmp_path / "web/b.jsonl", [{"text": "y"}])
    assert key() != first
