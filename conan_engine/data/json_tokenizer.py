"""Text to ids by a tokenizer.json of the `tokenizers` library, as a pretrained model brings it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as Library

from conan_engine.errors import UserError

# the token that ends a text, if no tokenizer_config.json names it: of Llama 3, Qwen and GPT, Llama 2 and Mistral, Gemma
ENDS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")
PROBE = " Aa\u0ddf\n\u00e9 \U0001f600  x"


def put(path: str | Path, content: bytes) -> None:
    """Write bytes to a file, by way of a file beside it."""
    partial = Path(f"{path}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(content)
    partial.replace(path)


class JsonTokenizer:
    """The same interface as tokenizer.Tokenizer.

    A text that spells a special token is ordinary text. What the file adds before and after a text, such as a begin
    token, is in `prefix` and `suffix`, lists of ids.
    """

    FILE = "tokenizer.json"

    def __init__(self, model: bytes, end: str, begin: str = "", template: str | None = None) -> None:
        """model: the file's bytes; end: the token that ends a text; begin: a chat template's bos_token; template:
        for conversations, in Jinja, or None.
        """
        self.model, self.end, self.begin, self.template = model, end, begin, template
        self.library = Library.from_str(model.decode())
        self.library.no_truncation()
        self.library.no_padding()
        self.library.encode_special_tokens = True
        self.vocab_size = max(self.library.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id = self.library.token_to_id(end)
        self.hash = hashlib.sha256(model + end.encode()).hexdigest()
        found = self.library.encode("a")
        added = found.special_tokens_mask
        first = added.index(0) if 0 in added else len(added)
        last = len(added) - added[::-1].index(0) if 0 in added else first
        self.prefix, self.suffix = found.ids[:first], found.ids[last:]

    @classmethod
    def load(cls, path: str | Path) -> JsonTokenizer:
        """Load a tokenizer.json. Raises UserError if it is missing, cannot be read, or loses text."""
        try:
            model = Path(path).read_bytes()
            known = {token["content"] for token in json.loads(model).get("added_tokens", ())}
            beside = Path(path).with_name("tokenizer_config.json")
            said = json.loads(beside.read_bytes()) if beside.exists() else {}
            end = _token(said, "eos_token") or next((token for token in ENDS if token in known), None)
            begin = _token(said, "bos_token") or ""
            template = _template(said, Path(path).with_name("chat_template.jinja"))
        except Exception as error:  # the library raises nothing narrower
            raise _unreadable(path, error) from None
        if end is None:
            raise UserError(
                f"{path}: does not say which token ends a text; put a tokenizer_config.json with eos_token beside it"
            )
        return cls.checked(path, model, end, begin, template)

    @classmethod
    def checked(cls, path: str | Path, model: bytes, *rest) -> JsonTokenizer:
        """The same as `load`, from the contents of `path`; rest: the further arguments of the class."""
        try:
            tokenizer = cls(model, *rest)
        except Exception as error:  # see above
            raise _unreadable(path, error) from None
        if tokenizer.eos_id is None:
            raise UserError(f"{path}: has no token {tokenizer.end!r}, which tokenizer_config.json says ends a text")
        if tokenizer.decode(tokenizer.encode(PROBE)) != PROBE:
            raise UserError(
                f"{path}: this tokenizer loses text: {PROBE!r} comes back as "
                f"{tokenizer.decode(tokenizer.encode(PROBE))!r}; use one that keeps case, spaces and every "
                "character"
            )
        return tokenizer

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json as it was, with the rest beside it."""
        about = (
            {"eos_token": self.end}
            | ({"bos_token": self.begin} if self.begin else {})
            | ({"chat_template": self.template} if self.template else {})
        )
        put(Path(folder, "tokenizer_config.json"), json.dumps(about).encode())
        put(Path(folder, self.FILE), self.model)

    def __reduce__(self):
        # the library's own pickle forgets which tokens are special
        return type(self), (self.model, self.end, self.begin, self.template)

    def encode(self, text: str) -> list[int]:
        """The ids of any text; a lone surrogate becomes U+FFFD."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        texts = [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts]
        return [found.ids for found in self.library.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_special(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """(ids, [(begin, end) in the text, ...]) of each text, in which special tokens count as such: for a chat
        template's text.
        """
        self.library.encode_special_tokens = False
        found = self.library.encode_batch(
            [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts], add_special_tokens=False
        )
        self.library.encode_special_tokens = True
        return [(one.ids, one.offsets) for one in found]

    def encode_texts(self, texts: list[str], most: int) -> list[list[int]]:
        """The ids of each text as a model reads it, at most `most`: cut, then with prefix and suffix."""
        room = most - len(self.prefix) - len(self.suffix)
        return [[*self.prefix, *ids[:room], *self.suffix] for ids in self.encode_batch(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.library.decode([int(i) for i in ids], skip_special_tokens=False)


def _token(said, key):
    """A token of a tokenizer_config.json, as text, or None."""
    found = said.get(key)
    return found["content"] if isinstance(found, dict) else found


def _template(said, beside):
    """The chat template of a tokenizer_config.json, or of the file beside it; the default one of several; or None."""
    if beside.exists():
        return beside.read_text(encoding="utf-8")
    found = said.get("chat_template")
    return (
        next((one["template"] for one in found if one["name"] == "default"), None) if isinstance(found, list) else found
    )


def _unreadable(path, error):
    reason = " ".join(str(error).split())
    return UserError(f"{path}: cannot load this tokenizer ({reason}); name a tokenizer.json of the tokenizers library")
