"""Text to ids by a tokenizer.json of the `tokenizers` library, as a pretrained model brings one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as Library

from conan_engine.errors import UserError

# what ends a text, where no tokenizer_config.json beside it says so: of Llama 3, Qwen and GPT, Llama 2 and Mistral,
# Gemma
ENDS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")
PROBE = " Aa\u0ddf\n\u00e9 \U0001f600  x"


def put(path: str | Path, content: bytes) -> None:
    """Bytes into a file, by way of one beside it."""
    partial = Path(f"{path}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(content)
    partial.replace(path)


class JsonTokenizer:
    """As tokenizer.Tokenizer. A text that spells a special token is a text like others; what the file puts before and
    after a text (a begin token, say) stands in `prefix` and `suffix`, lists of ids."""

    FILE = "tokenizer.json"

    def __init__(self, model: bytes, end: str, begin: str = "", template: str | None = None) -> None:
        """model: the file's bytes; end: the token, a str, that ends a text; begin: what a chat template calls
        bos_token; template: of conversations, in Jinja, or None."""
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
        """Raises UserError if `path` is missing, none of the library's tokenizers, or one that loses text."""
        try:
            model = Path(path).read_bytes()
            known = {token["content"] for token in json.loads(model).get("added_tokens", ())}
            beside = Path(path).with_name("tokenizer_config.json")
            said = json.loads(beside.read_bytes()) if beside.exists() else {}
            end = _token(said, "eos_token") or next((token for token in ENDS if token in known), None)
            begin = _token(said, "bos_token") or ""
            template = _template(said, Path(path).with_name("chat_template.jinja"))
        except Exception as error:  # the library raises no narrower one
            raise _unreadable(path, error) from None
        if end is None:
            raise UserError(
                f"{path}: says nowhere which token ends a text; put a tokenizer_config.json with eos_token beside it"
            )
        return cls.checked(path, model, end, begin, template)

    @classmethod
    def checked(cls, path: str | Path, model: bytes, *rest) -> JsonTokenizer:
        """As `load`, of what `path` holds: what the class is made of."""
        try:
            tokenizer = cls(model, *rest)
        except Exception as error:  # as above
            raise _unreadable(path, error) from None
        if tokenizer.eos_id is None:
            raise UserError(f"{path}: has no token {tokenizer.end!r}, which tokenizer_config.json says ends a text")
        if tokenizer.decode(tokenizer.encode(PROBE)) != PROBE:
            raise UserError(
                f"{path}: this tokenizer loses text: {PROBE!r} comes back as "
                f"{tokenizer.decode(tokenizer.encode(PROBE))!r}; take one that keeps case, spaces and every "
                "character"
            )
        return tokenizer

    def save(self, folder: str | Path) -> None:
        """tokenizer.json as it was, and beside it the rest."""
        about = (
            {"eos_token": self.end}
            | ({"bos_token": self.begin} if self.begin else {})
            | ({"chat_template": self.template} if self.template else {})
        )
        put(Path(folder, "tokenizer_config.json"), json.dumps(about).encode())
        put(Path(folder, self.FILE), self.model)

    def __reduce__(self):
        # the library's own pickle forgets that special tokens are none
        return type(self), (self.model, self.end, self.begin, self.template)

    def encode(self, text: str) -> list[int]:
        """Ids of any text; a lone surrogate, which is no text, becomes U+FFFD."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        texts = [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts]
        return [found.ids for found in self.library.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_special(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """(ids, [(begin, end) in the text, ...]) of each, special tokens as they are spelled, for what a chat template
        wrote."""
        self.library.encode_special_tokens = False
        found = self.library.encode_batch(
            [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts], add_special_tokens=False
        )
        self.library.encode_special_tokens = True
        return [(one.ids, one.offsets) for one in found]

    def encode_texts(self, texts: list[str], most: int) -> list[list[int]]:
        """Each text as a model reads it whole, at most `most` ids: cut, then prefix and suffix."""
        room = most - len(self.prefix) - len(self.suffix)
        return [[*self.prefix, *ids[:room], *self.suffix] for ids in self.encode_batch(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.library.decode([int(i) for i in ids], skip_special_tokens=False)


def _token(said, key):
    """A token of a tokenizer_config.json, as text, or None."""
    found = said.get(key)
    return found["content"] if isinstance(found, dict) else found


def _template(said, beside):
    """The chat template of a tokenizer_config.json, or of the file beside it; of several, the default; or None."""
    if beside.exists():
        return beside.read_text(encoding="utf-8")
    found = said.get("chat_template")
    return (
        next((one["template"] for one in found if one["name"] == "default"), None) if isinstance(found, list) else found
    )


def _unreadable(path, error):
    reason = " ".join(str(error).split())
    return UserError(f"{path}: cannot load this tokenizer ({reason}); name a tokenizer.json of the tokenizers library")
