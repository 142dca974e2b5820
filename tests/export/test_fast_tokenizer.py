"""The exported tokenizer gives our ids for any text, with nothing but the `tokenizers` library."""

import ast
import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast

from conan_engine.data.tokenizer import Tokenizer, train
from conan_engine.errors import UserError
from conan_engine.export.fast_tokenizer import convert

STRANGE = [
    "\u2581",
    "\x00",
    "\x1a",
    "\x1a0",
    "\x01",
    "\x7f",
    "\u200d",
    "\ufe0f",
    "👩\u200d👩\u200d👧",
    "👩",
    "\u0301",
    "é",
    "漢字",
    "ࡀ",
    "שלום",
    "مرحبا",
    "नमस्ते",
    "\r\n",
    "\t",
    "  ",
    "   ",
    "</s>",
    "<unk>",
    "<0x41>",
    "<0x",
    "12345",
]


def _trained(folder, texts, size):
    train(texts, folder / "t.model", size)
    return Tokenizer.load(folder / "t.model")


def _pair(tokenizer):
    return tokenizer, Fast.from_str(convert(tokenizer).to_str())  # as it is read from a file


@pytest.fixture(scope="module")
def ours_and_fast(tmp_path_factory):
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(ast.__file__).parent.glob("*.py"))[:80]]
    return _pair(_trained(tmp_path_factory.mktemp("code"), [*texts, *STRANGE], 4000))


@pytest.fixture(scope="module")
def two_letters(tmp_path_factory):
    """Of a text of two letters: nearly every piece can be put together in many ways, and often overlaps with itself."""
    texts = ["".join(random.choices("ab ", [5, 4, 1], k=200)) for _ in range(400)]
    return _pair(_trained(tmp_path_factory.mktemp("ab"), texts, 600))


def assert_same(ours, fast, texts):
    for text, expected, found in zip(texts, ours.encode_batch(texts), fast.encode_batch(texts)):
        assert found.ids == expected, repr(text)
        assert fast.decode(found.ids, skip_special_tokens=False) == text


@settings(deadline=None, max_examples=300)
@given(st.lists(st.one_of(st.text(max_size=8), st.sampled_from(STRANGE)), max_size=12).map("".join))
def test_any_text(ours_and_fast, text):
    assert_same(*ours_and_fast, [text])


def test_100_000_texts_of_pieces_code_points_and_what_is_strange(ours_and_fast):
    ours, _ = ours_and_fast
    pieces = [ours.processor.id_to_piece(i) for i in range(258, ours.vocab_size)]

    def point():
        return chr(random.choice([random.randrange(128), random.randrange(0xD800), random.randrange(0xE000, 0x110000)]))

    kinds = (lambda: random.choice(pieces), point, lambda: random.choice(STRANGE), lambda: random.choice("aaabb  .\n"))
    texts = [
        "".join(random.choices(kinds, weights)[0]() for _ in range(random.randrange(1, 16)))
        for weights in ([9, 0, 1, 0], [1, 9, 1, 1], [2, 2, 2, 2], [0, 0, 1, 9])
        for _ in range(25_000)
    ]
    assert_same(*ours_and_fast, texts)


def test_pieces_that_can_be_made_in_many_ways(two_letters):
    assert_same(
        *two_letters,
        [
            "".join(random.choices("ab ", [random.random(), random.random(), 0.1], k=random.randrange(1, 80)))
            for _ in range(20_000)
        ],
    )


def test_what_is_no_bpe_is_named(tmp_path):
    texts = [path.read_text(encoding="utf-8")[:4000] for path in sorted(Path(ast.__file__).parent.glob("*.py"))[:40]]
    options = dict(
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        bos_id=-1,
        eos_id=1,
        unk_id=0,
        minloglevel=2,
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(tmp_path / "u"),
        model_type="unigram",
        vocab_size=1000,
        **options,
    )
    with pytest.raises(UserError, match="neither a tokenizer.json nor a sentencepiece BPE model"):
        convert(Tokenizer.load(tmp_path / "u.model"))
