"""Rows of vectors by slice and by number, whatever their form on the disk; and the documents of rows."""

import gzip
import json

import numpy as np
import pytest
from runs import write_lines

from conan_engine.errors import UserError
from conan_engine.vectors import corpus as corpora
from conan_engine.vectors.corpus import Corpus
from conan_engine.vectors.making import Making, Share
from conan_engine.vectors.quantize import stored_as
from conan_engine.vectors.records import Records
from conan_engine.vectors.store import Store
from conan_engine.vectors.stored import Stored
from conan_engine.vectors.windows import Reading

DIM = 12


class Letters:
    """A tokenizer of characters."""

    def encode_texts(self, texts, most):
        return [[ord(character) for character in text[:most]] for text in texts]


def embed(tokens, cu_seqlens):
    """Unit vectors that the tokens alone decide."""
    chance = [np.random.default_rng(tokens[a:b].astype(np.int64)) for a, b in zip(cu_seqlens[:-1], cu_seqlens[1:])]
    vectors = np.stack([one.standard_normal(DIM, dtype=np.float32) for one in chance])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def texts(monkeypatch):
    monkeypatch.setattr(corpora, "UNIT", 2000)  # many units, of few documents
    chance = np.random.default_rng()
    return [f"text {i} " + "word " * chance.integers(1, 20) for i in range(300)]


@pytest.fixture
def source(tmp_path, texts):
    return write_lines(
        tmp_path / "in.jsonl", [{"_id": f"d{i}", "title": f"T{i}", "text": text} for i, text in enumerate(texts)]
    )


def made(source, out, precision="float32"):
    corpus = Corpus(str(source), str(source))
    about = {"source": corpus.name, "files": corpus.files(), "dim": DIM, "precision": precision, "weights": "w"}
    Making(Reading(corpus, Letters(), 64, 7), Store(out, *stored_as(precision, DIM)), Share(), embed, precision).run(
        about
    )
    return Stored(out, 64)


def expected(texts):
    tokens = Letters().encode_texts([f"T{i}\n{text}" for i, text in enumerate(texts)], 64)
    return np.concatenate([embed(np.array(one), [0, len(one)]) for one in tokens])


@pytest.mark.parametrize("out", ["out.npy", "out"])
@pytest.mark.parametrize(
    ("precision", "error"), [("float32", 1e-6), ("float16", 1e-3), ("int8", 1e-2), ("binary", None)]
)
def test_rows_are_the_vectors(tmp_path, source, texts, out, precision, error):
    stored, vectors = made(source, tmp_path / out, precision), expected(texts)
    assert len(stored) == 300 and stored.shape == (300, DIM) and stored.precision == precision
    rows = np.sort(np.random.default_rng().choice(300, 50, replace=False))
    for asked in (slice(0, 300), slice(0, 1), slice(290, 400), slice(137, 222), slice(5, 5), rows, rows[:1], rows[:0]):
        found = stored[asked]
        assert found.shape == vectors[asked].shape
        if precision == "binary":
            np.testing.assert_allclose(found, np.where(vectors[asked] > 0, 1, -1) / DIM**0.5, rtol=1e-6)
        else:
            np.testing.assert_allclose(found, vectors[asked], atol=error)


def test_a_file_of_others_is_read_too(tmp_path):
    vectors = np.random.default_rng().standard_normal((9, DIM)).astype(np.float16)
    np.save(tmp_path / "v.npy", vectors)
    stored = Stored(tmp_path / "v.npy", 64)
    np.testing.assert_array_equal(stored[2:9], vectors[2:9])
    assert stored.about is None and Records(stored).of([3])[3].id is None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: np.save(folder / "v.npy", np.zeros((3, 65), np.float32)), "of 65 numbers; expected at most 64"),
        (lambda folder: np.save(folder / "v.npy", np.zeros((3, 4), np.int64)), "holds int64 vectors"),
        (lambda folder: np.save(folder / "v.npy", np.zeros(3, np.float32)), r"its shape is \[3\]"),
        (lambda folder: (folder / "v.npy").write_text("no"), "cannot read vectors from it"),
        (lambda folder: None, "v.npy: cannot read vectors from it .*No such file"),
        (lambda folder: (folder / "v.index.json").write_text("{}"), "v.index.json: cannot read it"),
    ],
)
def test_anything_else_is_one_line(tmp_path, make, said):
    make(tmp_path)
    with pytest.raises(UserError, match=said) as error:
        Stored(tmp_path / "v.npy", 64)
    assert "\n" not in str(error.value)


def test_a_folder_of_something_else_is_one_line(tmp_path):
    with pytest.raises(UserError, match="index.json: cannot read it"):
        Stored(tmp_path, 64)


def test_int8_without_its_ranges_is_one_line(tmp_path, source):
    made(source, tmp_path / "out.npy", "int8")
    (tmp_path / "out.ranges.npy").unlink()
    with pytest.raises(UserError, match="out.ranges.npy is not there"):
        Stored(tmp_path / "out.npy", 64)


@pytest.mark.parametrize("out", ["out.npy", "out"])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_have_the_documents_that_they_were_made_of(tmp_path, source, texts, out, packed):
    if packed:
        source.with_suffix(".jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
        source = source.with_suffix(".jsonl.gz")
    records = Records(made(source, tmp_path / out))
    rows = np.random.default_rng().choice(300, 20).tolist()
    found = records.of(rows)
    assert found.keys() == set(rows)
    for row, document in found.items():
        assert document == (f"d{row}", f"T{row}\n{texts[row]}", f"T{row}", None)


@pytest.mark.parametrize("what", ["changed", "gone"])
def test_of_a_corpus_that_is_no_more_the_ids_are_left(tmp_path, source, what):
    stored = made(source, tmp_path / "out")
    source.write_text("{}") if what == "changed" else source.unlink()
    assert Records(stored).of([299, 7]) == {7: ("d7", "", None, None), 299: ("d299", "", None, None)}


def test_index_json_says_what_was_made(tmp_path, source):
    made(source, tmp_path / "out.npy")
    index = json.loads((tmp_path / "out.index.json").read_text())
    assert index["count"] == sum(index["units"]) == 300 and index["ids"] == "out.ids.jsonl" and len(index["units"]) > 5
