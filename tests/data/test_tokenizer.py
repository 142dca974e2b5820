"""Any text goes in and comes out again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conan_engine.data.tokenizer import Tokenizer, train
from conan_engine.errors import UserError

TEXTS = [
    f"The function number {i} returns a list, or None.\n    if x[{i}] is None:\n\treturn ['日本語', {i * 7}]"
    for i in range(300)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train(iter(TEXTS), path, 370)
    return Tokenizer.load(path)


@given(text=st.text())
def test_any_text_round_trips_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  a  b  ",
        "\n\n\t\r\n",
        "\u2581",
        "\x1a0\x1a1\u2581\x00",
        "<s></s><unk><0x0A>",
        "\ufeff\x85\u2028",
        "🎉\U0010ffff",
        "a\x00b",
    ],
)
def test_awkward_texts_round_trip_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_batch_is_each_alone(tokenizer):
    assert tokenizer.encode_batch(TEXTS[:9]) == [tokenizer.encode(text) for text in TEXTS[:9]]


def test_no_text_gives_the_unknown_or_the_end_id(tokenizer):
    ids = [i for ids in tokenizer.encode_batch([*TEXTS, "ʕ•ᴥ•ʔ \x00"]) for i in ids]
    assert 0 not in ids and tokenizer.eos_id not in ids and max(ids) < tokenizer.vocab_size == 370


def test_the_same_text_gives_the_same_hash_and_other_text_another(tokenizer, tmp_path):
    train(iter(TEXTS), tmp_path / "same.model", 370)
    train(iter(TEXTS[:200]), tmp_path / "other.model", 370)
    assert (
        Tokenizer.load(tmp_path / "same.model").hash == tokenizer.hash != Tokenizer.load(tmp_path / "other.model").hash
    )


def test_long_texts_are_not_dropped_in_training(tmp_path):
    train(iter(["zebra quagga okapi " * 20_000]), tmp_path / "long.model", 290)
    assert len(Tokenizer.load(tmp_path / "long.model").encode("zebra quagga okapi ")) < 10


@pytest.mark.parametrize(
    ("size", "said"), [(20_000, "larger than the text allows; set it to at most"), (20, "too small")]
)
def test_a_vocabulary_that_the_text_does_not_allow_is_named(tmp_path, size, said):
    with pytest.raises(UserError, match=said):
        train(iter(TEXTS), tmp_path / "x.model", size)
    assert not list(tmp_path.iterdir())


def test_what_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "x.model").write_bytes(b"not a model")
    for name in ("x.model", "absent.model"):
        with pytest.raises(UserError, match=f"{name}: cannot load this tokenizer"):
            Tokenizer.load(tmp_path / name)


@pytest.mark.parametrize("text", ["aaaa", "日本語のテキスト" * 500 + " ", "x" * 5000 + " y"])
def test_a_text_with_hardly_a_space_makes_a_tokenizer_that_keeps_spaces(tmp_path, text):
    train(iter([text] * 3), tmp_path / "t.model", 260 + len(set(text + " ")) - 2)
    tokenizer = Tokenizer.load(tmp_path / "t.model")
    assert tokenizer.decode(tokenizer.encode(f"a b  {text}")) == f"a b  {text}"
    with pytest.raises(
        UserError,
        match=r"tokenizer.vocab_size is 258, too small for the text's characters and the 256 bytes; set it to at "
        r"least 26\d",
    ):
        train(iter([text] * 3), tmp_path / "t.model", 258)
