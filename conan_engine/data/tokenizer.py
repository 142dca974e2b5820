"""Text to ids and back, for any text: sentencepiece BPE with byte fallback and a reversible escape."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from conan_engine.data import gguf_file, gguf_tokenizer
from conan_engine.data.json_tokenizer import JsonTokenizer, put
from conan_engine.errors import UserError

# sentencepiece writes a space as U+2581, and so reads every U+2581 back as a space. A text's own U+2581 is therefore
# escaped by a control character, which is escaped itself. So is NUL, at which sentencepiece would end the text.
SPACE = "\u2581"
ESCAPES = {"\x1a": "\x1a0", SPACE: "\x1a1", "\x00": "\x1a2"}
ESCAPED = {code: text for text, code in ESCAPES.items()}
LIBRARY = r"\w+: \S+\.\w+\(\d+\) (\[.*?\] ?)?"  # the place in sentencepiece's source that an error names
LINE = 4000  # longest training sentence in characters: sentencepiece silently drops longer ones


class Tokenizer:
    """A sentencepiece tokenizer. A text gets no prefix or suffix.

    model: the file's bytes; hash: their SHA-256 in hex, which every shard and checkpoint holds; vocab_size; eos_id,
    which ends a text; threads, which encode a batch (-1: one per core).
    """

    FILE, prefix, suffix, template = "tokenizer.model", [], [], None

    def __init__(self, model: bytes) -> None:
        """model: the bytes of a sentencepiece model."""
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self.processor.vocab_size()
        self.hash = hashlib.sha256(model).hexdigest()
        self.eos_id = self.processor.eos_id()
        self.threads = -1

    @classmethod
    def load(cls, path: str | Path) -> AnyTokenizer:
        """Load a tokenizer, or the JsonTokenizer of a .json or .gguf file. Raises UserError if it is missing or not
        usable.
        """
        if Path(path).suffix == ".json":
            return JsonTokenizer.load(path)
        if gguf_file.is_gguf(path):
            return gguf_tokenizer.load(path)
        try:
            tokenizer = cls(Path(path).read_bytes())
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{path}: cannot load this tokenizer ({error}); name a sentencepiece .model file, or a tokenizer.json"
            ) from None
        if tokenizer.eos_id < 0 or tokenizer.decode(tokenizer.encode(" \u2581\u0ddf\n")) != " \u2581\u0ddf\n":
            raise UserError(
                f"{path}: this sentencepiece model loses text (it needs byte fallback, no normalisation and an "
                "end id); leave tokenizer.path empty to train one"
            )
        return tokenizer

    @staticmethod
    def of(folder: str | Path) -> Path | None:
        """The path of the tokenizer in the folder of a run or a model, or None."""
        return next((path for cls in (JsonTokenizer, Tokenizer) if (path := Path(folder, cls.FILE)).exists()), None)

    def save(self, folder: str | Path) -> None:
        put(Path(folder, self.FILE), self.model)

    def __reduce__(self):
        return type(self), (self.model,)

    def encode(self, text: str) -> list[int]:
        """The ids of any text; a lone surrogate becomes U+FFFD."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.processor.encode([escape(text) for text in texts], num_threads=self.threads)

    def encode_texts(self, texts: list[str], most: int) -> list[list[int]]:
        """The ids of each text as a model reads it, at most `most`."""
        return [ids[:most] for ids in self.encode_batch(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """The exact text again. Ids that end within a character give U+FFFD."""
        text = self.processor.decode([int(i) for i in ids])
        return re.sub("\x1a[012]", lambda match: ESCAPED[match.group()], text)


def escape(text: str) -> str:
    # a search for one character is many times faster than a regular expression
    if SPACE in text or "\x1a" in text or "\x00" in text:
        text = re.sub("[\x1a\u2581\x00]", lambda match: ESCAPES[match.group()], text)
    return text if text.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", text)


def train(texts: Iterable[str], path: str | Path, vocab_size: int) -> None:
    """Train a tokenizer on an iterator of texts and write it to `path`. Raises UserError if the texts cannot fill
    `vocab_size`.
    """
    model = io.BytesIO()
    lines = (
        line[i : i + LINE] for text in texts for line in escape(text).split("\n") for i in range(0, len(line), LINE)
    )
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,  # bytes stand for the rarest characters
            required_chars=SPACE,  # as bytes it would be read back as a space
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # for indentation
            split_digits=True,
            bos_id=-1,
            eos_id=1,
            unk_id=0,
            max_sentence_length=4 * LINE + 64,  # in bytes
            shuffle_input_sentence=False,
            num_threads=os.cpu_count(),
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        most = re.search(r"value <= (\d+)", reason)
        least = re.search(r"required_chars\. \d+ vs (\d+)", reason)
        advice = (
            f"larger than the text allows; set it to at most {most.group(1)}, or give more text" if most
            else f"too small for the text's characters and the 256 bytes; set it to at least {least.group(1)}" if least
            else f"not one that a tokenizer of this text can have ({re.sub(LIBRARY, '', reason)}); give more "
                "text, or another number"
        )  # fmt: skip
        raise UserError(f"tokenizer.vocab_size is {vocab_size}, {advice}") from None
    put(path, model.getvalue())


AnyTokenizer = Tokenizer | JsonTokenizer
