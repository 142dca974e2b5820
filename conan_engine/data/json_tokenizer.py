"""Text to ids by a tokenizer.json of the `tokenizers` library, as a pretrained model brings one."""

import hashlib
import json
import re
from pathlib import Path

from tokenizers import Tokenizer as Library

from conan_engine.errors import UserError

# what ends a text, where no tokenizer_config.json beside it says so: of Llama 3, Qwen and GPT, Llama 2 and Mistral, Gemma
ENDS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")
PROBE = " Aa\u0ddf\n\u00e9 \U0001f600  x"


def put(path, content):
    """Bytes into a file, by way of one beside it."""
    partial = Path(f"{path}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(content)
    partial.replace(path)


class JsonTokenizer:
    """As tokenizer.Tokenizer. A text that spells a special token is a text like others; what the file puts before and after a text
    (a begin token, say) stands in `prefix` and `suffix`, lists of ids."""

    FILE = "tokenizer.json"

    def __init__(self, model, end):
        """model: the file's bytes; end: the token, a str, that ends a text."""
        self.model, self.end = model, end
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
    def load(cls, path):
        """Raises UserError if `path` is missing, none of the library's tokenizers, or one that loses text."""
        try:
            model = Path(path).read_bytes()
            known = {token["content"] for token in json.loads(model).get("added_tokens", ())}
            beside = Path(path).with_name("tokenizer_config.json")
            said = json.loads(beside.read_bytes()).get("eos_token") if beside.exists() else None
            said = said["content"] if isinstance(said, dict) else said
            end = said or next((token for token in ENDS if token in known), None)
        except Exception as error:  # the library raises no narrower one
            raise _unreadable(path, error) from None
        if end is None:
            raise UserError(f"{path}: says nowhere which token ends a text; put a tokenizer_config.json with eos_token beside it")
        return cls.checked(model, end, path)

    @classmethod
    def checked(cls, model, end, path):
        """As `load`, of what `path` holds: a tokenizer.json's bytes, and which token ends a text."""
        try:
            tokenizer = cls(model, end)
        except Exception as error:  # as above
            raise _unreadable(path, error) from None
        if tokenizer.eos_id is None:
            raise UserError(f"{path}: has no token {end!r}, which tokenizer_config.json says ends a text")
        if tokenizer.decode(tokenizer.encode(PROBE)) != PROBE:
            raise UserError(f"{path}: this tokenizer loses text: {PROBE!r} comes back as {tokenizer.decode(tokenizer.encode(PROBE))!r}; take one that keeps case, spaces and every character")
        return tokenizer

    def save(self, folder):
        """tokenizer.json as it was, and which token ends a text."""
        put(Path(folder, "tokenizer_config.json"), json.dumps({"eos_token": self.end}).encode())
        put(Path(folder, self.FILE), self.model)

    def __reduce__(self):
        return type(self), (self.model, self.end)  # the library's own pickle forgets that special tokens are none

    def encode(self, text):
        """Ids of any text; a lone surrogate, which is no text, becomes U+FFFD."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        texts = [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts]
        return [found.ids for found in self.library.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_texts(self, texts, most):
        """Each text as a model reads it whole, at most `most` ids: cut, then prefix and suffix."""
        room = most - len(self.prefix) - len(self.suffix)
        return [[*self.prefix, *ids[:room], *self.suffix] for ids in self.encode_batch(texts)]

    def decode(self, ids):
        return self.library.decode([int(i) for i in ids], skip_special_tokens=False)


def _unreadable(path, error):
    reason = " ".join(str(error).split())
    return UserError(f"{path}: cannot load this tokenizer ({reason}); name a tokenizer.json of the tokenizers library")
