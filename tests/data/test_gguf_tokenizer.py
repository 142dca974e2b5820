"""Tokenizers inside GGUF files: the ids of the libraries that they were made with, and the way back."""

import ast
import io
import random
import re
from pathlib import Path

import gguf
import pytest
import sentencepiece
from gguf_files import close, of_library, of_pieces
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

from conan_engine.data import gguf_tokenizer
from conan_engine.data.json_tokenizer import JsonTokenizer
from conan_engine.data.tokenizer import Tokenizer as Ours
from conan_engine.errors import UserError

CODE = [path.read_text(encoding="utf-8")[:20_000] for path in sorted(Path(ast.__file__).parent.glob("*.py"))[:40]]
STRANGE = [
    "  12 \u0663\u0664 x\u00bd",
    "na\u00efve caf\u00e9",
    "\u4e2d\u6587 \u65e5\u672c\u8a9e",
    "\U0001f600\u200d\U0001f469",
    "I'LL we've IT'S",
    "\t\t \r\n\n x",
    "<|end|> spelled, <think>",
    "word" * 40,
    "camelCaseWORDS",
    "a/b//c/\n",
]
TEXTS = [piece for text in CODE[:10] for piece in text.split("\n\n") if piece] + STRANGE


def random_texts(count):
    def point():
        return random.choice(
            [
                chr(random.randrange(32, 127)),
                chr(random.randrange(0xA0, 0x3000)),
                chr(random.randrange(0x4E00, 0x9FFF)),
                " ",
                "\n",
                "7",
            ]
        )

    return ["".join(point() for _ in range(random.randrange(1, 30))) for _ in range(count)]


def byte_level(words=None, normalizer=None, ignore_merges=False):
    library = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    library.normalizer, library.decoder = normalizer, decoders.ByteLevel()
    library.pre_tokenizer = words or pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        CODE + STRANGE * 5,
        trainers.BpeTrainer(
            vocab_size=2000, special_tokens=["<|begin|>", "<|end|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    library.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return library


def save(path, tokenizer, *changes):
    writer = gguf.GGUFWriter(path, "llama")
    tokenizer(writer)
    for change in changes:
        change(writer)
    close(writer)
    return path


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "smaug-bpe", "qwen2", "deepseek-r1-qwen", "tekken", "gpt-2"])
def test_words_are_cut_as_transformers_cuts_them(tmp_path, pre):
    """Its own reader knows these names; two things it leaves out: whole words of Llama 3 and Mistral, and composed
    characters of Qwen."""
    path = save(tmp_path / "t.gguf", of_library(byte_level(), pre, "<|end|>", "<|begin|>", add_bos=False))
    architecture, about, _ = get_gguf_tokenizer(str(path))
    theirs, _ = convert_gguf_tokenizer(architecture, about)
    theirs.encode_special_tokens = True
    theirs.model = models.BPE(
        about_vocabulary(about),
        [tuple(merge.split(" ")) for merge in about["merges"]],
        ignore_merges=pre in gguf_tokenizer.WHOLE_WORDS,
    )
    theirs.normalizer = normalizers.NFC() if pre in gguf_tokenizer.COMPOSED else None
    ours = Ours.load(path)
    texts = TEXTS + random_texts(2000)
    assert ours.encode_batch(texts) == [found.ids for found in theirs.encode_batch(texts, add_special_tokens=False)]
    assert (ours.prefix, ours.suffix, ours.eos_id) == ([], [], ours.library.token_to_id("<|end|>"))


def about_vocabulary(about):
    return {token: i for i, token in enumerate(about["tokens"])}


def test_smollms_digits_stand_alone(tmp_path):
    """As the tokenizer.json of SmolLM2 has it; transformers' reader of GGUF does not know the name."""
    library = byte_level(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    )
    ours = Ours.load(save(tmp_path / "t.gguf", of_library(library, "smollm", "<|end|>")))
    library.encode_special_tokens = True
    texts = TEXTS + random_texts(2000)
    assert ours.encode_batch(texts) == [found.ids for found in library.encode_batch(texts, add_special_tokens=False)]


@pytest.mark.parametrize(
    ("pre", "flags", "prefix", "suffix"),
    [
        ("llama-bpe", {}, ["<|begin|>"], []),
        ("gpt-2", {}, [], []),
        ("gpt-2", {"add_bos": True, "add_eos": True}, ["<|begin|>"], ["<|end|>"]),
        ("qwen2", {"add_eos": True}, [], ["<|end|>"]),
        ("llama-bpe", {"add_bos": False}, [], []),
    ],
)
def test_what_a_text_begins_and_ends_with(tmp_path, pre, flags, prefix, suffix):
    ours = Ours.load(save(tmp_path / "t.gguf", of_library(byte_level(), pre, "<|end|>", "<|begin|>", **flags)))
    assert ([ours.library.id_to_token(i) for i in ours.prefix], [ours.library.id_to_token(i) for i in ours.suffix]) == (
        prefix,
        suffix,
    )


def pieces(prefix, size=1500):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in CODE for line in text.split("\n")), model_writer=model, model_type="bpe",
        vocab_size=size, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=prefix, remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_are_those_of_sentencepiece(tmp_path, prefix):
    model = pieces(prefix)
    ours = Ours.load(save(tmp_path / "t.gguf", of_pieces(model, prefix)))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    texts = [text for text in TEXTS + random_texts(2000) if "\u2581" not in text]
    assert ours.encode_batch(texts) == [theirs.encode(text) for text in texts]
    assert [ours.decode(ids) for ids in ours.encode_batch(texts)] == texts
    assert (ours.prefix, ours.suffix) == ([theirs.bos_id()], []), (
        "llama.cpp begins such texts with the begin token where the file does not say"
    )


@pytest.mark.parametrize("kind", ["llama-bpe", "qwen2", "tekken", "smollm", "gpt-2", "pieces", "pieces behind a space"])
def test_written_again_it_is_the_same(tmp_path, kind):
    flags = {"add_bos": kind in ("llama-bpe", "pieces"), "add_eos": kind == "qwen2"}
    first = (
        of_pieces(pieces("space" in kind), "space" in kind, **flags)
        if "pieces" in kind
        else of_library(byte_level(), kind, "<|end|>", "<|begin|>", **flags)
    )
    once = Ours.load(save(tmp_path / "once.gguf", first))
    again = Ours.load(
        save(tmp_path / "again.gguf", lambda writer: gguf_tokenizer.write(writer, once, once.vocab_size + 5, "run"))
    )
    texts = TEXTS + random_texts(500)
    assert again.encode_texts(texts, 10**6) == once.encode_texts(texts, 10**6)
    assert (again.eos_id, again.end, again.prefix, again.suffix, again.vocab_size) == (
        once.eos_id,
        once.end,
        once.prefix,
        once.suffix,
        once.vocab_size + 5,
    )


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            "smollm",
        ),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)]), "gpt-2"),
        (
            pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
            None,
        ),
    ],
)
def test_a_tokenizer_json_gets_llama_cpps_name_or_is_refused(tmp_path, words, named):
    tokenizer = JsonTokenizer(byte_level(words).to_str().encode(), "<|end|>")
    if named is None:
        with pytest.raises(UserError, match="cuts texts into words in a way that llama.cpp has no name for"):
            save(
                tmp_path / "t.gguf", lambda writer: gguf_tokenizer.write(writer, tokenizer, tokenizer.vocab_size, "run")
            )
        return
    path = save(
        tmp_path / "t.gguf", lambda writer: gguf_tokenizer.write(writer, tokenizer, tokenizer.vocab_size, "run")
    )
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == named
    assert Ours.load(path).encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_more_than_a_begin_token_has_no_place(tmp_path):
    library = byte_level()
    library.post_processor = processors.TemplateProcessing(
        single="<|begin|> <|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    tokenizer = JsonTokenizer(library.to_str().encode(), "<|end|>")
    with pytest.raises(UserError, match="puts 2 tokens before and 0 behind a text"):
        save(tmp_path / "t.gguf", lambda writer: gguf_tokenizer.write(writer, tokenizer, tokenizer.vocab_size, "run"))


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (
            lambda: of_library(byte_level(), "deepseek-llm", "<|end|>"),
            "tokenizer.ggml.pre is 'deepseek-llm'; known are llama-bpe",
        ),
        (lambda: of_library(byte_level(), None, "<|end|>"), "tokenizer.ggml.pre is 'none'; known are"),
        (
            lambda: of_library(byte_level(), "gpt-2", None),
            "tokenizer.ggml.eos_token_id is None; a text needs a token that ends it",
        ),
        (
            lambda: lambda writer: writer.add_tokenizer_model("t5"),
            "tokenizer.ggml.model is 't5'; init_from reads 'gpt2' (byte-level BPE) and 'llama'",
        ),
    ],
)
def test_a_tokenizer_that_we_cannot_make_is_named(tmp_path, tokenizer, said):
    path = save(tmp_path / "t.gguf", tokenizer())
    with pytest.raises(UserError, match=re.escape(f"{path}: ")) as error:
        Ours.load(path)
    assert said in str(error.value) and "set tokenizer.path to the model's tokenizer.json" in str(error.value)


def test_llama_cpp_cuts_alike(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama.cpp; `make check-gguf` builds it")
    for kind in ("smollm", "llama-bpe", "gpt-2", "pieces", "pieces behind a space"):
        first = (
            of_pieces(pieces("space" in kind), "space" in kind)
            if "pieces" in kind
            else of_library(byte_level(), kind, "<|end|>", "<|begin|>")
        )
        path = save(
            tmp_path / f"{kind}.gguf",
            first,
            lambda writer: (
                writer.add_context_length(64),
                writer.add_embedding_length(64),
                writer.add_block_count(1),
                writer.add_feed_forward_length(64),
                writer.add_head_count(1),
                writer.add_layer_norm_rms_eps(1e-5),
            ),
        )
        ours, theirs = Ours.load(path), llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        for text in TEXTS + random_texts(2000):
            if "<think>" not in text:  # llama.cpp finds it where it is told to look for special tokens
                assert theirs.tokenize(text.encode(), add_bos=False, special=False) == ours.encode(text), (kind, text)
