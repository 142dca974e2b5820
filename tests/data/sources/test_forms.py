"""Files as people have them: the forms of other libraries, tables, byte-order marks, nulls, and numbers that are
none."""

import gzip
import json

import pytest

from conan_engine.data.sources import files
from conan_engine.data.sources.forms import Bad, record
from conan_engine.errors import UserError

PAIR = {"query": "q", "pos": ["p"]}


@pytest.mark.parametrize(
    ("row", "kind", "wanted"),
    [
        # sentence-transformers
        ({"anchor": "q", "positive": "p"}, "pairs", PAIR),
        ({"anchor": "q", "positive": "p", "negative": "n"}, "pairs", PAIR | {"neg": ["n"]}),
        (
            {"query": "q", "positive": "p", "negative_1": "a", "negative_2": "b", "negative_10": "c"},
            "pairs",
            PAIR | {"neg": ["a", "b", "c"]},
        ),
        ({"question": "q", "answer": "p"}, "pairs", PAIR),
        ({"query": "q", "answer": "p"}, "pairs", PAIR),
        ({"sentence1": "q", "sentence2": "p"}, "pairs", PAIR),
        ({"sentence1": "q", "sentence2": "p", "score": 1}, "sts", {"sentence1": "q", "sentence2": "p", "score": 1}),
        (
            {"sentence_A": "q", "sentence_B": "p", "score": 0.5},
            "sts",
            {"sentence1": "q", "sentence2": "p", "score": 0.5},
        ),
        # FlagEmbedding
        (
            {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1], "prompt": ""},
            "pairs",
            PAIR | {"neg": ["n"], "pos_scores": [1]},
        ),
        (
            {"query": "q", "pos": ["p"], "neg": ["n", "m"], "pos_scores": [], "neg_scores": [0.5, -2]},
            "pairs",
            PAIR | {"neg": ["n", "m"], "neg_scores": [0.5, -2]},
        ),
        (
            {"query": "q", "pos": "p", "neg": "n", "pos_scores": 3, "neg_scores": 0.1},
            "pairs",
            PAIR | {"neg": ["n"], "pos_scores": [3], "neg_scores": [0.1]},
        ),
        # Tevatron
        (
            {
                "query_id": "1",
                "query": "q",
                "positive_passages": [{"docid": "2", "title": "t", "text": "p"}, {"title": "", "text": "p"}],
                "negative_passages": [{"text": "n"}],
            },
            "pairs",
            {"query": "q", "pos": ["t p", "p"], "neg": ["n"]},
        ),
        (
            {"query": "q", "positive_passages": [{"title": "t", "text": "p"}], "negative_passages": []},
            "pairs",
            {"query": "q", "pos": ["t p"]},
        ),
        # mteb
        ({"text": "t", "label": 3}, "label", {"text": "t", "label": "3"}),
        ({"text": "t", "label": 3, "label_text": "three"}, "label", {"text": "t", "label": "three"}),
        # a null is an absent key
        ({"query": "q", "pos": ["p"], "neg": None, "score": None}, "pairs", PAIR),
        (
            {"instruction": "i", "input": None, "output": "o"},
            "instruction",
            {"instruction": "i", "input": "", "output": "o"},
        ),
        ({"sentence1": "q", "sentence2": "p", "score": None}, "pairs", PAIR),
    ],
)
def test_the_forms_of_other_libraries(row, kind, wanted):
    assert record(row, {}) == (kind, wanted)


@pytest.mark.parametrize(
    ("columns", "row", "wanted"),
    [
        ({"query": "title", "pos": "body"}, {"title": "q", "body": "p", "text": "not this"}, ("pairs", PAIR)),
        (
            {"query": "title", "pos": "body", "neg": ["wrong", "worse"], "score": "s"},
            {"title": "q", "body": ["p"], "wrong": "a", "worse": ["b", "c"], "s": 0.5},
            ("pairs", PAIR | {"neg": ["a", "b", "c"], "score": 0.5}),
        ),
        ({"text": "body"}, {"body": "t", "query": "q", "pos": "p"}, ("text", {"text": "t"})),
        ({"text": "tweet", "label": "mood"}, {"tweet": "t", "mood": 1}, ("label", {"text": "t", "label": "1"})),
    ],
)
def test_columns_named_in_the_config(columns, row, wanted):
    assert record(row, columns) == wanted
    with pytest.raises(Bad, match="is missing"):
        record({key: value for key, value in row.items() if key not in next(iter(columns.values()))}, columns)


HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    ("line", "reason", "said"),
    [
        (
            '{"sentence1": "a", "sentence2": "b", "score": NaN}',
            "not a finite number",
            "'score' is NaN; expected a finite number",
        ),
        ('{"sentence1": "a", "sentence2": "b", "score": 1e39}', "not a finite number", "'score' is 1e"),
        ('{"query": "a", "pos": "b", "score": -Infinity}', "not a finite number", "'score' is -Infinity"),
        ('{"query": "a", "pos": ["b"], "pos_scores": [NaN]}', "not a finite number", "'pos_scores' is NaN"),
        ('{"query": "a", "pos": ["b"], "pos_scores": ["1"]}', "wrong type", "'pos_scores'"),
        (
            '{"query": "a", "pos": ["b"], "neg": ["c", "d"], "neg_scores": [1]}',
            "not a score for each",
            "'neg_scores' holds 1 scores for 2 texts",
        ),
        ('{"query": "a", "pos": "b", "score": 1e999}', "not a finite number", "'score' is Infinity"),
        (f'{{"query": "a", "pos": "b", "score": {HUGE}}}', "not a finite number", "'score' is 10000"),
        (
            f'{{"query": "a", "pos": "b", "score": {"9" * 5000}}}',
            "not a finite number",
            "an integer of more than 4,300 digits",
        ),
        ('{"query": "a", "pos": "b", "score": true}', "wrong type", "'score' is true; expected number"),
        ('{"query": " \\t\\u3000", "pos": "b"}', "empty text", "'query' holds an empty text"),
        ('{"query": "a", "pos": ["b", "\\n"]}', "empty text", "'pos' holds an empty text"),
        (
            '{"query": "a", "positive_passages": [{"title": "t"}]}',
            "wrong type",
            "'positive_passages' is .*; expected list of texts",
        ),
        ('{"anchor": "a", "positive": 3}', "wrong type", "'positive' is 3"),
        ('{"anchor": "a", "pos": "b"}', "missing key", "key 'positive' is missing|key 'query' is missing"),
        ("[" * 100_000, "broken JSON", "nested too deeply"),
    ],
)
def test_what_is_wrong_is_named_by_line_and_counted_by_reason(tmp_path, line, reason, said):
    path = tmp_path / "x.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(UserError, match=f"x.jsonl: line 2: .*({said})") as raised:
        list(files.read(path))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    left_out = []
    with pytest.raises(UserError, match="no records that can be used"):
        list(files.read(path, reject=lambda path, place, bad: left_out.append((place, bad.reason))))
    assert left_out == [("line 2", reason)]


def test_a_byte_order_mark_is_left_out(tmp_path):
    for name, data in (("x.jsonl", b'{"text": "a"}\n'), ("x.csv", b"text\na\n"), ("x.txt", b"a\n")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data)
        assert list(files.read(tmp_path / name)) == [("text", {"text": "a"})]


def test_tables_with_a_header(tmp_path):
    rows = [{"query": 'a "b", c', "pos": "two\nlines"}, {"query": "d", "pos": "x" * 200_000, "score": "0.5"}]
    csv = 'query,pos,score\r\n"a ""b"", c","two\nlines",\r\n\r\nd,' + "x" * 200_000 + ",0.5\r\n"
    wanted = [("pairs", row | {"pos": [row["pos"]]} | ({"score": 0.5} if "score" in row else {})) for row in rows]
    for name, data in (("x.csv", csv), ("x.tsv", csv.replace(",", "\t").replace('b""\t c', 'b"", c')), ("x.CSV", csv)):
        (tmp_path / name).write_bytes(data.encode())
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data.encode()))
        assert list(files.read(tmp_path / name)) == list(files.read(tmp_path / f"{name}.gz")) == wanted


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("query,pos\na,b\nc\n", "line 3: 1 cells where the header has 2"),
        ("query,pos\na,b,c\n", "line 2: 3 cells where the header has 2"),
        ("query,pos,score\na,b,high\n", "line 2: 'score' is \"high\"; expected number"),
        ("query,pos\na,\n", "line 2: key 'pos' is missing"),
        ("query,query\na,b\n", "line 1: the header names a column twice"),
        ('query,pos\n"a"b,c\n', "line 2: broken CSV"),
        ("query,pos\n", "holds no records"),
    ],
)
def test_a_mistake_in_a_table_is_named_by_line(tmp_path, data, said):
    (tmp_path / "x.csv").write_text(data)
    with pytest.raises(UserError, match=f"x.csv: {said}"):
        list(files.read(tmp_path / "x.csv"))


def test_one_bad_row_of_a_table_is_left_out_alone(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"text\na\n\xff\nb,b\nc\n")
    left_out = []
    found = list(files.read(tmp_path / "x.csv", reject=lambda path, place, bad: left_out.append((place, bad.reason))))
    assert [r["text"] for _, r in found] == ["a", "c"]
    assert left_out == [("line 3", "not UTF-8"), ("line 4", "broken CSV")]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("x.json", json.dumps([{"text": "a"}]).encode(), "one JSON array, .* turn it into JSON Lines: python -c"),
        ("x.json", json.dumps({"data": [{"text": "a"}]}, indent=1).encode(), "JSON of one object over several lines"),
        ("x.data", b'{"text": "a"}\n', "JSON Lines by its first line; rename it to x.jsonl"),
        ("x.xlsx", b"PK\x03\x04rest", "a zip archive or a spreadsheet; save it as .csv"),
        ("x", b"\x28\xb5\x2f\xfdrest", "compressed by zstd; rename it to end in .jsonl.zst"),
        ("x", b"\x1f\x8brest", "compressed by gzip"),
        ("x.md", b"# Title\n", "of an unknown kind; turn it into JSON Lines"),
        ("x.dat", b"PAR1rest", "a Parquet file; rename it"),
    ],
)
def test_a_file_of_another_kind_is_told_what_it_is_and_what_to_do(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=said) as raised:
        list(files.read(tmp_path / name))
    assert str(tmp_path / name) in str(raised.value) and "\n" not in str(raised.value)


def test_json_lines_by_the_name_of_json_are_read(tmp_path):
    (tmp_path / "x.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert [r["text"] for _, r in files.read(tmp_path / "x.json")] == ["a", "b"]


def test_a_line_of_plain_text_is_a_text(tmp_path):
    (tmp_path / "x.txt").write_text("a\n\n b \n")
    assert [r["text"] for _, r in files.read(tmp_path / "x.txt")] == ["a", "", " b "]
