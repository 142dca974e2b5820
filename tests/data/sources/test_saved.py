"""Datasets as the `datasets` package saves them and as the Hub has them, read from where they lie."""

import json
import shutil

import pytest
from datasets import Dataset, DatasetDict, config, disable_progress_bars
from pyarrow import feather, ipc

from conan_engine.data.sources import files, hub, paths
from conan_engine.errors import UserError

disable_progress_bars()
ROWS = [{"query": f"question {i}", "pos": f"answer {i}"} for i in range(3000)]
TRAIN, TEST = Dataset.from_list(ROWS), Dataset.from_list(ROWS[:7])


def queries(source):
    return [record["query"] for _, record in files.read(source)]


ALL = [row["query"] for row in ROWS]


def test_a_dataset_that_was_saved(tmp_path):
    TRAIN.save_to_disk(tmp_path / "saved", num_shards=3)
    TEST.save_to_disk(tmp_path / "other")
    # as map() leaves it there
    shutil.copy(tmp_path / "other/data-00000-of-00001.arrow", tmp_path / "saved/cache-0123.arrow")
    assert [path.name for path in paths.of(tmp_path / "saved")] == [f"data-{i:05}-of-00003.arrow" for i in range(3)]
    assert queries(tmp_path / "saved") == ALL


def test_of_several_splits_train_is_read(tmp_path):
    DatasetDict(train=TRAIN, test=TEST).save_to_disk(tmp_path / "saved")
    assert queries(tmp_path / "saved") == ALL and queries(tmp_path / "saved/test") == ALL[:7]
    DatasetDict(dev=TRAIN, test=TEST).save_to_disk(tmp_path / "without")
    with pytest.raises(UserError, match=r"holds the splits dev, test and no 'train'; name the files of one"):
        queries(tmp_path / "without")


@pytest.mark.parametrize("form", ["stream", "file", "feather"])
def test_an_arrow_file_alone_in_parts_or_whole(tmp_path, form):
    table, path = TRAIN.data.table.combine_chunks(), tmp_path / "x.arrow"
    if form == "feather":
        feather.write_feather(table, path, compression="lz4")
    else:
        with (ipc.new_stream if form == "stream" else ipc.new_file)(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=700)
    assert queries(path) == ALL
    readers = [files.Reader([paths.Piece(path, 1, part, 3)]) for part in range(3)]
    parts = [[(reader.where[1], record["query"]) for _, record in reader] for reader in readers]
    assert sorted(sum(parts, []), key=lambda one: int(one[0].split()[1])) == [
        (f"row {i + 1}", query) for i, query in enumerate(ALL)
    ]
    assert form == "feather" or all(parts)


def test_what_is_no_arrow_file_is_named(tmp_path):
    (tmp_path / "x.arrow").write_text("text")
    with pytest.raises(UserError, match=r"x\.arrow: not an Arrow file that pyarrow can read"):
        queries(tmp_path / "x.arrow")
    TRAIN.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved/state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json: cannot be read"):
        queries(tmp_path / "saved")


README = """---
language: de
configs:
- config_name: {name}
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: [data/test-*]
{more}---
# A dataset
"""


def a_repository(folder, name="default", more=""):
    (folder / "data").mkdir(parents=True)
    for part in range(2):
        TRAIN.select(range(1500 * part, 1500 * (part + 1))).to_parquet(
            folder / f"data/train-{part:05}-of-00002.parquet"
        )
    TEST.to_parquet(folder / "data/test-00000-of-00001.parquet")
    (folder / "README.md").write_text(README.format(name=name, more=more))
    return folder


def test_a_repository_of_the_hub_says_what_is_its_training_data(tmp_path):
    assert queries(a_repository(tmp_path / "a", "some")) == ALL
    other = "- config_name: other\n  data_files: data/test-*\n"
    assert queries(a_repository(tmp_path / "b", "default", other)) == ALL
    with pytest.raises(UserError, match="declares the configs some, other; name the files of one"):
        queries(a_repository(tmp_path / "c", "some", other))
    assert queries(a_repository(tmp_path / "d", "some", other + "  default: true\n")) == ALL[:7]
    without = a_repository(tmp_path / "e")
    for head in (
        "language: [de",
        "configs: 3",
        "configs: [x]",
        "configs:\n- config_name: a\n  data_files: [{split: train}]",
    ):
        (without / "README.md").write_text(f"---\n{head}\n---\n")
        assert len(queries(without)) == 3007, "a README that declares nothing"


def test_columns_within_columns(tmp_path):
    rows = [
        {"translation": {"de": "Haus", "en": "house", "a.b": "x"}, "a.b": "own"},
        {"translation": {"de": None, "en": "tree"}, "a.b": "own"},
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    records = files.read(tmp_path / "x.parquet", {"query": "translation.de", "pos": ["translation.en", "a.b"]})
    assert next(records) == ("pairs", {"query": "Haus", "pos": ["house", "own"]})
    with pytest.raises(UserError, match=r"x\.parquet: row 2: 'translation\.de' is missing"):
        next(records)
    rejected = []
    reader = files.Reader(
        [paths.Piece(tmp_path / "x.parquet")],
        {"query": "translation.en", "pos": "translation.de"},
        lambda *bad: rejected.append(bad[1]),
    )
    assert [record["query"] for _, record in reader] == ["house"] and rejected == ["row 2"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.files.cache_clear()
    return tmp_path / "cache"


def test_by_name_from_a_local_folder(tmp_path, cache):
    name = f"hf:{a_repository(tmp_path / 'local', 'some')}"
    assert queries(name) == queries(f"{name}:some") == ALL
    assert queries(f"{name}:some:test") == queries(f"{name}::test") == ALL[:7]
    assert all(path.suffix == ".arrow" and path.is_relative_to(cache) for path in paths.of(name))


def test_offline_by_name_from_what_is_cached(tmp_path, cache):
    """As if it had been loaded from the Hub once."""
    (made,) = paths.of(f"hf:{a_repository(tmp_path / 'local')}")
    version = cache / "someone___pairs/default/0.0.0" / ("0" * 40)
    version.parent.mkdir(parents=True)
    shutil.move(made.parent, version)
    (version / made.name).rename(version / "pairs-train.arrow")
    about = json.loads((version / "dataset_info.json").read_text())
    (version / "dataset_info.json").write_text(json.dumps(about | {"dataset_name": "pairs"}))
    assert queries("hf:someone/pairs") == ALL


@pytest.mark.parametrize(("source", "said"), [
    ("hf:no-one/nothing", r"hf:no-one/nothing: datasets cannot load it \(.*\); check the name"),
    ("hf:a/b:c:train[:10%]", "expected hf:OWNER/NAME"), ("hf:", "expected hf:OWNER/NAME"),
])  # fmt: skip
def test_what_cannot_be_loaded_is_one_line(cache, source, said):
    with pytest.raises(UserError, match=said) as error:
        queries(source)
    assert "\n" not in str(error.value)
