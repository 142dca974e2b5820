"""The records that people have, as the engine's own six kinds: which keys say what, and what is wrong with a record.

Read are the engine's own keys, and the forms that sentence-transformers, FlagEmbedding, Tevatron, ms-swift, TRL and
OpenAI document. Other columns are named in the config ("columns": the engine's key -> theirs).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from conan_engine.data.sources import chats
from conan_engine.data.sources.bad import Bad, short, wrong

# kind -> key -> the types its value may have. A key that is optional has None among them.
KINDS: dict[str, dict[str, tuple]] = {
    "instruction": {"instruction": (str,), "input": (str, None), "output": (str,)},
    "pairs": {
        "query": (str,),
        "pos": (list, str),
        "neg": (list, str, None),
        "score": (float, int, None),
        "pos_scores": (list, float, int, None),
        "neg_scores": (list, float, int, None),
    },
    "sts": {"sentence1": (str,), "sentence2": (str,), "score": (float, int)},
    "label": {"text": (str,), "label": (str, int)},
    "chat": {"messages": (list,)},
    "text": {"text": (str,)},
}
# The first whose keys a record has says what it is: (kind, {the engine's key: the record's}).
FORMS: tuple[tuple[str, dict[str, str]], ...] = (
    ("instruction", {"instruction": "instruction", "output": "output"}),
    ("pairs", {"query": "messages", "pos": "positive_messages"}),  # ms-swift's
    ("chat", {"messages": "messages"}),  # OpenAI's, and TRL's
    ("chat", {"messages": "conversations"}),  # ShareGPT's
    ("pairs", {"query": "query", "pos": "pos"}),  # FlagEmbedding's, and ours
    ("pairs", {"query": "query", "pos": "positive_passages"}),  # Tevatron's
    ("pairs", {"query": "query", "pos": "positive"}),  # sentence-transformers' from here
    ("pairs", {"query": "anchor", "pos": "positive"}),
    ("pairs", {"query": "question", "pos": "answer"}),
    ("pairs", {"query": "query", "pos": "answer"}),
    ("sts", {"sentence1": "sentence1", "sentence2": "sentence2", "score": "score"}),
    ("sts", {"sentence1": "sentence_A", "sentence2": "sentence_B", "score": "score"}),
    ("pairs", {"query": "sentence1", "pos": "sentence2"}),
    ("label", {"text": "text", "label": "label_text"}),  # mteb's, beside a number
    ("label", {"text": "text", "label": "label"}),
    ("text", {"text": "text"}),
)
NEGATIVES = re.compile(r"neg|negative(_\d+)?|negative_(passages|messages)")
COLUMNS = tuple(dict.fromkeys(key for keys in KINDS.values() for key in keys))  # what a config may name
LISTS = ("pos", "neg")
SCORES = {"pos_scores": "pos", "neg_scores": "neg"}  # one for each text of the other, where they are there
LARGEST = float(np.finfo(np.float32).max)  # of a score, which shards keep as float32


def kind_of(keys: Iterable[str]) -> str | None:
    """Which of KINDS a record with these of the engine's own keys is, or None."""
    return next((kind for kind, form in FORMS if form.keys() == set(form.values()) and form.keys() <= set(keys)), None)


def record(row: dict[str, Any], columns: dict, typed: bool = True) -> tuple[str, dict]:
    """A row as a record of the engine's: (kind, dict of the keys of its kind), "pos" and "neg" always lists, "label"
    text.

    columns: {the engine's key: the row's, or a list of those (pos, neg)}; empty: FORMS say. typed: False where every
    value is text (CSV), and a number must be read from it. A null is an absent key. Raises Bad.
    """
    if None in row.values():
        row = {key: value for key, value in row.items() if value is not None}
    if columns:
        kind, named = kind_of(columns) or "", columns
    elif chat := chats.of_row(row):
        return chat
    else:
        kind, named = _form(tuple(row))
        if kind is None:
            raise Bad("missing key", _missing(row))
        if kind == "text" and type(row["text"]) is str:  # the most there are, and nothing else to look at
            return kind, {"text": row["text"]}
    found: dict[str, Any] = {}
    for key, types in KINDS[kind].items():
        values = [value for name in _names(named.get(key, ())) if (value := _value(row, name)) is not None]
        if not values:
            if None not in types:
                raise Bad(
                    "missing key",
                    f"{_shown(named[key])} is missing from a {kind} record with keys {sorted(row)}; add it, or "
                    "name the columns in the config",
                )
            continue
        place = _shown(named[key])
        if kind == "chat":
            return kind, {key: chats.conversation(values[0], place)}
        if key in LISTS:
            found[key] = _texts(values, place)
        elif key in SCORES:
            if values[0] != []:  # as some write where they have none
                found[key] = _scores(values[0], place, typed, found.get(SCORES[key], []))
        else:
            value = chats.text(values[0], place) if named[key] == "messages" else values[0]
            found[key] = _number(value, place, typed) if float in types else _text(value, types, place)
        # they may be empty there, a text to embed may not
        if kind not in ("text", "instruction") and key not in SCORES:
            for text in found[key] if key in LISTS else [found[key]]:
                if isinstance(text, str) and not text.strip():
                    raise Bad(
                        "empty text",
                        f"{place} holds an empty text; there is nothing to embed in it: fill it or leave the "
                        "record out",
                    )
    if kind == "pairs" and not found["pos"]:
        raise Bad("empty text", f"{_shown(named['pos'])} is empty; a query needs at least one positive")
    if kind == "instruction":
        found.setdefault("input", "")
    if kind == "pairs" and not found.get("neg", True):
        del found["neg"]
    return kind, found


@functools.lru_cache(4096)  # a file's rows have the same keys nearly always
def _form(keys):
    """The kind of a record with these keys, and which of them is which of the engine's; (None, None) for no kind."""
    kind, form = next(((kind, form) for kind, form in FORMS if all(key in keys for key in form.values())), (None, None))
    if kind is None:
        return None, None
    named = form | {key: key for key in KINDS[kind] if key not in form}
    if kind == "pairs":
        named["neg"] = sorted(filter(NEGATIVES.fullmatch, keys), key=lambda key: (len(key), key))
    return kind, named


def _value(row, name):
    """What a column holds, or, where none is called so, a dotted name reaches within one; None for nothing."""
    if name in row or "." not in name:
        return row.get(name)
    for part in name.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def _names(name):
    return [name] if isinstance(name, str) else name


def _shown(name):
    return " and ".join(map(repr, _names(name)))


def _texts(values, place):
    """All texts of some values, each a text, a passage or a list of those."""
    texts = []
    for value in values:
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, list):
                item = chats.text(item, place)
            if (
                isinstance(item, dict)
                and isinstance(item.get("text"), str)
                and isinstance(item.get("title"), str | None)
            ):
                # Tevatron's passages, as it joins them
                item = f"{item['title']} {item['text']}" if item.get("title") else item["text"]
            if not isinstance(item, str):
                raise wrong(value, place, "list of texts or text")
            texts.append(item)
    return texts


def _text(value, types, place):
    if int in types and type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise wrong(value, place, "text or whole number" if int in types else "text")
    return value


def _number(value, place, typed):
    if not typed and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise wrong(value, place, "number") from None
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise wrong(value, place, "number")
    if not (isinstance(value, int) or math.isfinite(value)) or abs(value) > LARGEST:
        raise Bad(
            "not a finite number",
            f"{place} is {short(value)}; expected a finite number, at most {LARGEST:.1e}: give a score or leave "
            "the key out",
        )
    return value


def _scores(value, place, typed, texts):
    scores = [_number(one, place, typed) for one in (value if isinstance(value, list) else [value])]
    if len(scores) != len(texts):
        raise Bad(
            "not a score for each",
            f"{place} holds {len(scores)} scores for {len(texts)} texts; give one for each, or leave the key out",
        )
    return scores


def _missing(row):
    """What the record most likely lacks: the form that shares most keys with it says."""
    likeness = [len(set(form.values()) & row.keys()) for _, form in FORMS]
    if not max(likeness):
        known = ", ".join(str(list(keys)) for keys in KINDS.values())
        return (
            f"found keys {sorted(row)}; expected one of {known} (README: your own data), or their names in the config"
        )
    kind, form = FORMS[likeness.index(max(likeness))]
    lacking = [key for key in form.values() if key not in row]
    return (
        f"key {lacking[0]!r} is missing from a {kind} record with keys {sorted(row)}; "
        f"add it, or name the columns in the config"
    )
