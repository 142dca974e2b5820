"""From records to shards: which kinds fit a stage, the teacher's filter, labels as pairs, and what is reused."""

import sys
import types

import numpy as np
import pytest
import runs
from runs import small_tokenizer, write_lines

from conan_engine.config import Pretrain, Sft, Supervised, Weak
from conan_engine.config import Tokenizer as TokenizerSettings
from conan_engine.data import build, encoding, units
from conan_engine.data.tokenizer import Tokenizer
from conan_engine.errors import UserError

PAIRS = [
    {"query": f"question {i}", "pos": [f"answer {i}", f"another answer {i}"], "neg": [f"wrong {i}"] * (i % 3)}
    for i in range(9)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return small_tokenizer(folder)


def shards_of(path, use, settings, tokenizer):
    return runs.shards_of(path, use, settings, tokenizer, path.parent / "data")


def texts_of(shards, tokenizer, field):
    """That field of every record that has it, as text."""
    records = np.flatnonzero(shards.field_counts(np.arange(len(shards))) > field)
    tokens, cu_seqlens = shards.gather(records, np.full(len(records), field))
    return [tokenizer.decode(tokens[start:end].tolist()) for start, end in zip(cu_seqlens, cu_seqlens[1:])]


def test_a_pair_becomes_one_record_a_positive_with_its_negatives(tmp_path, tokenizer):
    shards = shards_of(write_lines(tmp_path / "pairs.jsonl", PAIRS), "supervised", Supervised(), tokenizer)
    assert texts_of(shards, tokenizer, 0) == [r["query"] for r in PAIRS for _ in r["pos"]]
    assert texts_of(shards, tokenizer, 1) == [p for r in PAIRS for p in r["pos"]]
    assert texts_of(shards, tokenizer, 2) == [r["neg"][0] for r in PAIRS for _ in r["pos"] if r["neg"]]
    assert len(set(shards.groups(np.arange(18)).tolist())) == 18


def test_instruction_and_input_make_the_query(tmp_path, tokenizer):
    records = [
        {"instruction": "answer", "input": "question 1", "output": "good"},
        {"instruction": "", "input": "question 2", "output": "bad"},
    ]
    shards = shards_of(write_lines(tmp_path / "i.jsonl", records), "weak", Weak(), tokenizer)
    assert texts_of(shards, tokenizer, 0) == ["answer\nquestion 1", "question 2"]
    assert texts_of(shards, tokenizer, 1) == ["good", "bad"]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"instruction": "", "input": "", "output": "a"}, "instruction and input"),
        ({"instruction": "a", "input": "", "output": ""}, "output"),
    ],
)
def test_an_instruction_that_leaves_nothing_to_embed_is_named(tmp_path, tokenizer, record, said):
    path = write_lines(tmp_path / "i.jsonl", [{"instruction": "a", "input": "b", "output": "c"}, record])
    with pytest.raises(UserError, match=f"i.jsonl: line 2: its {said} is empty"):
        shards_of(path, "weak", Weak(), tokenizer)


def test_a_teachers_low_scores_are_dropped(tmp_path, tokenizer, monkeypatch):
    teacher = types.ModuleType("own_teacher")
    teacher.score = lambda queries, documents: [0.39 if query.endswith(("3", "5")) else 0.4 for query in queries]
    monkeypatch.setitem(sys.modules, "own_teacher", teacher)
    path = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    kept = set(texts_of(shards_of(path, "weak", Weak(teacher="own_teacher:score"), tokenizer), tokenizer, 0))
    assert kept == {r["query"] for r in PAIRS} - {"question 3", "question 5"}


def test_a_teacher_judges_each_positive_by_itself(tmp_path, tokenizer, monkeypatch):
    teacher = types.ModuleType("own_teacher")
    teacher.score = lambda queries, documents: [
        0.9 if document.startswith("another") else 0.1 for document in documents
    ]
    monkeypatch.setitem(sys.modules, "own_teacher", teacher)
    shards = shards_of(
        write_lines(tmp_path / "pairs.jsonl", PAIRS), "weak", Weak(teacher="own_teacher:score"), tokenizer
    )
    assert texts_of(shards, tokenizer, 1) == [r["pos"][1] for r in PAIRS]


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (
            lambda queries, documents: [0.0] * len(queries),
            r"pairs.jsonl: weak.teacher 'own_teacher:score' puts every pair below weak.min_score = 0.4",
        ),
        (lambda queries, documents: [1.0], r"own_teacher:score gave 1 scores for 18 pairs"),
        (lambda queries, documents: [1.0, float("nan")] * 9, r"own_teacher:score gave nan for the query 'question 0'"),
    ],
)
def test_a_teacher_that_drops_all_or_miscounts_is_named(tmp_path, tokenizer, monkeypatch, scores, said):
    teacher = types.ModuleType("own_teacher")
    teacher.score = scores
    monkeypatch.setitem(sys.modules, "own_teacher", teacher)
    path = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    for _ in range(2):  # what the first try left half written is no shard of the second
        with pytest.raises(UserError, match=said):
            shards_of(path, "weak", Weak(teacher="own_teacher:score"), tokenizer)
    assert not list(tmp_path.glob("data/*/manifest.json"))


def test_another_min_score_asks_the_teacher_nothing(tmp_path, tokenizer, monkeypatch):
    """Nor does a start after one that was killed, but for what that one had not got to."""
    teacher, asked = types.ModuleType("own_teacher"), []

    def score(queries, documents):
        asked.extend(queries)
        if len(asked) > 250:
            raise KeyboardInterrupt
        return [int(query.split()[1]) / 300 for query in queries]

    teacher.score = score
    monkeypatch.setitem(sys.modules, "own_teacher", teacher)
    monkeypatch.setattr(encoding, "BATCH", (100, 10_000))
    path = write_lines(tmp_path / "pairs.jsonl", [{"query": f"question {i}", "pos": f"answer {i}"} for i in range(300)])
    with pytest.raises(KeyboardInterrupt):
        shards_of(path, "weak", Weak(teacher="own_teacher:score"), tokenizer)
    (scores,) = tmp_path.glob("data/scores-*/*.f64")
    assert scores.stat().st_size == 200 * 8
    with scores.open("ab") as file:
        file.write(b"half")
    del asked[:]
    for least, kept in ((0.4, range(120, 300)), (0.7, range(210, 300)), (0.0, range(300))):
        shards = shards_of(path, "weak", Weak(teacher="own_teacher:score", min_score=least), tokenizer)
        assert texts_of(shards, tokenizer, 0) == [f"question {i}" for i in kept]
        np.testing.assert_array_equal(
            shards.scores(np.arange(len(shards))), np.array([i / 300 for i in kept], np.float32)
        )
    assert asked == [f"question {i}" for i in range(200, 300)]


def test_the_datas_own_score_filters_where_there_is_no_teacher(tmp_path, tokenizer):
    scored = [{**r, "score": i / 8} if i else r for i, r in enumerate(PAIRS)]  # the first has none and stays
    kept = set(
        texts_of(shards_of(write_lines(tmp_path / "pairs.jsonl", scored), "weak", Weak(), tokenizer), tokenizer, 0)
    )
    assert kept == {r["query"] for i, r in enumerate(PAIRS) if i == 0 or i / 8 >= 0.4}


def test_a_teacher_that_cannot_be_loaded_is_named(tmp_path, tokenizer):
    path = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(UserError, match=r"weak.teacher: cannot load 'no_such_module:f'"):
        shards_of(path, "weak", Weak(teacher="no_such_module:f"), tokenizer)


def test_a_label_becomes_a_pair_with_its_class_as_group(tmp_path, tokenizer):
    records = [{"text": f"question {i}", "label": "good" if i % 2 else "bad"} for i in range(8)]
    shards = shards_of(write_lines(tmp_path / "labels.jsonl", records), "supervised", Supervised(), tokenizer)
    groups = shards.groups(np.arange(8)).tolist()
    assert len(set(groups[::2])) == len(set(groups[1::2])) == 1 and groups[0] != groups[1]
    positives = texts_of(shards, tokenizer, 1)
    assert positives[0] == positives[2] == "bad" and positives[3] == "question 1"  # the label, or the class's last text


def test_a_text_is_one_record_however_long_and_ends_in_the_end_token(tmp_path, tokenizer):
    texts = ["question and answer " * 30, ""]
    shards = shards_of(
        write_lines(tmp_path / "t.jsonl", [{"text": text} for text in texts]),
        "pretrain",
        Pretrain(max_tokens=16),
        tokenizer,
    )
    tokens, cu_seqlens = shards.gather(np.arange(2), 0)
    assert [tokens[a:b].tolist() for a, b in zip(cu_seqlens, cu_seqlens[1:])] == [
        [*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)
    ]


def test_a_long_instruction_leaves_room_for_the_output(tmp_path, tokenizer):
    long = "question " * 100
    records = [{"instruction": long, "input": long, "output": "answer " * 100}]
    shards = shards_of(write_lines(tmp_path / "i.jsonl", records), "sft", Sft(max_tokens=40), tokenizer)
    lengths = [int(shards.lengths(np.array([0]), np.array([field]))[0]) for field in range(3)]
    assert lengths[0] == 10 and lengths[0] + lengths[1] == 20 and sum(lengths) == 40


def test_shards_that_stand_are_reused_and_a_changed_file_is_read_again(tmp_path, tokenizer, monkeypatch):
    path = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    first = shards_of(path, "weak", Weak(), tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(units, "ShardWriter", None)  # writing again would fail
        assert len(shards_of(path, "weak", Weak(), tokenizer)) == len(first)
    write_lines(path, PAIRS[:4])
    assert len(shards_of(path, "weak", Weak(), tokenizer)) == 8


def test_a_source_that_does_not_fit_the_stage_is_named(tmp_path, tokenizer):
    path = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(UserError, match=r"pairs.jsonl: holds pairs records; sft takes instruction"):
        shards_of(path, "sft", Sft(), tokenizer)


def test_a_given_tokenizer_goes_with_the_run(tmp_path, folder, tokenizer):
    given = folder / "tokenizer.model"
    run = tmp_path / "run"
    assert build.make_tokenizer(TokenizerSettings(path=str(given)), [], run).hash == tokenizer.hash
    assert Tokenizer.load(run / "tokenizer.model").hash == tokenizer.hash


def test_no_text_at_all_for_a_tokenizer_is_named(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", [{"text": ""}])
    with pytest.raises(UserError, match="hold no text to train a tokenizer on"):
        build.make_tokenizer(TokenizerSettings(vocab_size=300), [(str(path), "pretrain", None)], tmp_path)


@pytest.mark.parametrize("fields", [("instruction", "input", "output"), ("query", "pos")])
def test_a_tokenizer_that_sees_a_part_of_the_text_sees_a_part_of_every_field(tmp_path, fields):
    """As many of each, whatever the period of the fields; here a third and a half of the text."""
    words = {field: f"{field} " * 20 for field in fields}
    path = write_lines(tmp_path / "mine.jsonl", [words] * 600)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "train", lambda texts, path, vocab_size: seen.extend(texts))
        patch.setattr(build.Tokenizer, "load", lambda path: None)
        total = sum(map(len, words.values())) * 600
        settings = TokenizerSettings(train_bytes=total // len(fields))
        build.make_tokenizer(settings, [(str(path), "weak", None)], tmp_path)
    for word in words.values():
        assert seen.count(word) == pytest.approx(600 / len(fields), rel=0.05)
