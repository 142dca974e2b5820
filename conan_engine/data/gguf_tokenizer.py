"""Read and write the tokenizer of a GGUF file: byte-level BPE ("gpt2") and sentencepiece BPE ("llama").

A GGUF file has no tokenizer.json. It lists tokens, their types, and merges or scores. How a text is cut into words
before the merges is only a name (`tokenizer.ggml.pre`) that llama.cpp knows. This module knows the names of Llama,
Mistral, Qwen and SmolLM.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conan_engine.data import gguf_file
from conan_engine.data.json_tokenizer import JsonTokenizer
from conan_engine.data.merges import merges
from conan_engine.errors import UserError

SPACE = "\u2581"  # sentencepiece's character for a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # values of gguf.TokenType

_APOSTROPHE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = rf"{_APOSTROPHE}|{_LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_QWEN2 = rf"{_APOSTROPHE}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
)


def _bytes(own_regex):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": own_regex}


def _split(regex):
    cut = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, _bytes(False)]}


# tokenizer.ggml.pre -> pre_tokenizer of a tokenizer.json; of several names for one kind, export writes the first
WORDS = {
    "llama-bpe": _split(_LLAMA3),
    "llama3": _split(_LLAMA3),
    "llama-v3": _split(_LLAMA3),
    "smaug-bpe": _split(_LLAMA3),
    "dbrx": _split(_LLAMA3),
    "qwen2": _split(_QWEN2),
    "deepseek-r1-qwen": _split(_QWEN2),
    "tekken": _split(_TEKKEN),
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _bytes(True)]},
    "starcoder": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _bytes(True)]},
    "gpt-2": _bytes(True),
}
# with these, a word that is a token stays whole, whatever the merges say
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")
BEGIN = WHOLE_WORDS  # with these, a text begins with the begin token unless the file says otherwise
# with these, characters are composed first (NFC), which llama.cpp leaves to the user
COMPOSED = ("qwen2", "deepseek-r1-qwen")


def load(path: str | Path) -> JsonTokenizer:
    """The JsonTokenizer that a GGUF file describes. Raises UserError for one that has no such form."""
    fields, _ = gguf_file.read(path)
    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama") or not fields.get("tokenizer.ggml.tokens"):
        raise UserError(
            f"{path}: tokenizer.ggml.model is {kind!r}; init_from reads 'gpt2' (byte-level BPE) and 'llama' "
            "(sentencepiece BPE): set tokenizer.path to the model's tokenizer.json"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(set(tokens)) < len(tokens):
        raise UserError(
            f"{path}: tokenizer.ggml.tokens names a token twice; set tokenizer.path to the model's tokenizer.json"
        )
    about = _byte_level(path, fields, tokens) if kind == "gpt2" else _pieces(fields, tokens, types)
    about["added_tokens"] = [
        {
            "id": i,
            "content": tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[i] == CONTROL,
        }
        for i in range(len(tokens))
        if types[i] in (CONTROL, USER_DEFINED)
    ]
    end = fields.get("tokenizer.ggml.eos_token_id")
    if end is None or not end < len(tokens):
        raise UserError(
            f"{path}: tokenizer.ggml.eos_token_id is {end}; a text needs a token that ends it: set "
            "tokenizer.path to the model's tokenizer.json"
        )
    _add_template(about, fields, tokens, kind)
    begin = fields.get("tokenizer.ggml.bos_token_id", len(tokens))
    model = json.dumps(about, ensure_ascii=False).encode()
    return JsonTokenizer.checked(
        path, model, tokens[end], tokens[begin] if begin < len(tokens) else "", fields.get("tokenizer.chat_template")
    )


def _byte_level(path, fields, tokens):
    name = fields.get("tokenizer.ggml.pre", "none")
    if name not in WORDS:
        raise UserError(
            f"{path}: tokenizer.ggml.pre is {name!r}; known are {', '.join(WORDS)}: set tokenizer.path to the "
            "model's tokenizer.json"
        )
    pairs = [merge.split(" ") for merge in fields.get("tokenizer.ggml.merges", ())]
    model = {
        "type": "BPE",
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": pairs,
        "ignore_merges": name in WHOLE_WORDS,
    }
    return {
        "model": model,
        "normalizer": {"type": "NFC"} if name in COMPOSED else None,
        "pre_tokenizer": WORDS[name],
        "decoder": _bytes(True),
    }


def _pieces(fields, tokens, types):
    scores = fields.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    pairs = merges({token: score for token, score, kind in zip(tokens, scores, types) if kind == NORMAL})
    unknown = next((token for token, kind in zip(tokens, types) if kind == UNKNOWN), None)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        spaces = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]}
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = {
        "type": "BPE",
        "vocab": vocabulary,
        "merges": [list(pair) for pair in pairs],
        "unk_token": unknown,
        "byte_fallback": True,
    }
    return {
        "model": model,
        "normalizer": spaces,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
    }


def _add_template(about, fields, tokens, kind):
    """Add the tokens that a text begins and ends with."""
    begins = fields.get("tokenizer.ggml.add_bos_token", kind == "llama" or fields.get("tokenizer.ggml.pre") in BEGIN)
    ends = fields.get("tokenizer.ggml.add_eos_token", False)
    begin, end = (
        fields.get(f"tokenizer.ggml.{key}_token_id") if wanted else None
        for key, wanted in (("bos", begins), ("eos", ends))
    )
    around = [{"SpecialToken": {"id": tokens[i], "type_id": 0}} for i in (begin, end) if i is not None]
    if not around:
        return
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    single = [*around[: begin is not None], *text, *around[begin is not None :]]
    special = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in (begin, end) if i is not None}
    about["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special,
    }


def write(writer: Any, tokenizer: Any, rows: int, where: str) -> None:
    """Add a JsonTokenizer to a gguf.GGUFWriter. rows: of the token table, which may exceed the tokens.

    Raises UserError if llama.cpp has no name for the tokenizer's way to cut words.
    """
    about = json.loads(tokenizer.model)
    model, added = about["model"], {token["id"]: token for token in about.get("added_tokens", ())}
    tokens = {i: token for token, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    types = {i: CONTROL if token["special"] else USER_DEFINED for i, token in added.items()}
    name = _name_of(about) if model["type"] == "BPE" else None
    if name:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_merges([" ".join(pair) for pair in _pairs(model)])
    elif model["type"] == "BPE" and model.get("byte_fallback") and about.get("pre_tokenizer") is None:
        scores, prefix = _scores(model, types, tokens), '"Prepend"' in json.dumps(about.get("normalizer"))
        _check_scores(tokenizer, scores, where)
        types |= {
            i: BYTE for i, token in tokens.items() if len(token) == 6 and token.startswith("<0x") and i not in types
        }
        types |= {model["vocab"][model["unk_token"]]: UNKNOWN} if model.get("unk_token") else {}
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([scores.get(tokens.get(i), 0.0) for i in range(rows)])
        writer.add_add_space_prefix(prefix)
    else:
        raise _no_name(where)
    writer.add_token_list([tokens.get(i, f"[unused {i}]").encode() for i in range(rows)])
    writer.add_token_types([types.get(i, NORMAL) if i in tokens else UNUSED for i in range(rows)])
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.eos_id)
    if len(tokenizer.prefix) > 1 or tokenizer.suffix not in ([], [tokenizer.eos_id]):
        raise UserError(
            f"{where}: its tokenizer puts {len(tokenizer.prefix)} tokens before and {len(tokenizer.suffix)} "
            "behind a text, for which GGUF has no place; use another --format"
        )
    if tokenizer.prefix:
        writer.add_bos_token_id(tokenizer.prefix[0])
    writer.add_add_bos_token(bool(tokenizer.prefix))
    writer.add_add_eos_token(bool(tokenizer.suffix))


def _no_name(where):
    return UserError(
        f"{where}: its tokenizer.json cuts texts into words in a way that llama.cpp has no name for (known: "
        f"{', '.join(WORDS)}); "
        "export the sentence-transformers form and give that to llama.cpp's convert_hf_to_gguf.py"
    )


def _name_of(about):
    """llama.cpp's name for how a tokenizer.json cuts a text into words, or None."""
    found, whole = _plain(about.get("pre_tokenizer")), bool(about["model"].get("ignore_merges"))
    for name, words in WORDS.items():
        composed = {"type": "NFC"} if name in COMPOSED else None
        if found == _plain(words) and whole == (name in WHOLE_WORDS) and about.get("normalizer") in (None, composed):
            return name
    return None


def _plain(words):
    """A pre_tokenizer without what does not change the ids: offsets, and a sequence of one."""
    if isinstance(words, dict):
        words = {key: _plain(value) for key, value in words.items() if key not in ("trim_offsets", "invert")}
        inner = words.get("pretokenizers")
        return inner[0] if inner and len(inner) == 1 else words
    return [_plain(part) for part in words] if isinstance(words, list) else words


def _pairs(model):
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]


def _scores(model, types, tokens):
    """{piece: score}: the earlier the merges make a piece, the better its score."""
    scores = {}
    for rank, pair in enumerate(_pairs(model)):
        scores.setdefault("".join(pair), -float(rank))
    apart = {tokens[i] for i in types}
    return scores | {
        piece: -float(len(model["merges"]) + 1)
        for piece in model["vocab"]
        if piece not in scores and piece not in apart
    }


def _check_scores(tokenizer, scores, where):
    """Raise UserError unless the scores, from which sentencepiece derives its merges, give the same tokens as these
    merges.
    """
    about = json.loads(tokenizer.model)
    single = {token for token in scores if len(token) == 6 and token.startswith("<0x")}
    about["model"]["merges"] = [
        list(pair) for pair in merges({piece: score for piece, score in scores.items() if piece not in single})
    ]
    again = JsonTokenizer(json.dumps(about).encode(), tokenizer.end)
    every = tokenizer.decode(range(tokenizer.vocab_size)) + tokenizer.decode(range(tokenizer.vocab_size - 1, -1, -1))
    if again.encode(every) != tokenizer.encode(every):
        raise _no_name(where)
