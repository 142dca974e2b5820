"""Recognise the forms of records that people have, and turn them into the engine's six kinds.

Recognised are the engine's own keys, and the forms that sentence-transformers, FlagEmbedding, Tevatron, ms-swift, TRL
and OpenAI document. A config names other columns ("columns": our key -> theirs).
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

# kind -> key -> the types of its value; an optional key has None among them
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
# The first form whose keys a record has decides: (kind, {our key: the record's}).
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
# the keys that a config may name columns for
COLUMNS = tuple(dict.fromkeys(key for keys in KINDS.values() for key in keys))
LISTS = ("pos", "neg")
SCORES = {"pos_scores": "pos", "neg_scores": "neg"}  # one score for each text of the other key, if there are any
LARGEST = float(np.finfo(np.float32).max)  # the largest score, since shards keep float32


def kind_of(keys: Iterable[str]) -> str | None:
    """The kind of a record with these keys of ours, or None."""
    return next((kind for kind, form in FORMS if form.keys() == set(form.values()) and form.keys() <= set(keys)), None)


def record(row: dict[str, Any], columns: dict, typed: bool = True) -> tuple[str, dict]:
    """A row as (kind, dict of the keys of its kind). "pos" and "neg" are always lists, "label" is text. Raises Bad.

    columns: {our key: the row's, or a list of those (pos, neg)}; empty: FORMS decide. typed: False if every value is
    text (CSV) and numbers must be parsed. A null counts as an absent key.
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
        if kind == "text" and type(row["text"]) is str:  # the most frequent kind, with nothing else to check
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
            if values[0] != []:  # some files hold an empty list where there is none
                found[key] = _scores(values[0], place, typed, found.get(SCORES[key], []))
        else:
            value = chats.text(values[0], place) if named[key] == "messages" else values[0]
            found[key] = _number(value, place, typed) if float in types else _text(value, types, place)
        # an empty text is allowed there, but not one to embed
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


@functools.lru_cache(4096)  # the rows of a file nearly always have the same keys
def _form(keys):
    """(kind, {our key: the record's}) of a record with these keys; (None, None) for no kind."""
    kind, form = next(((kind, form) for kind, form in FORMS if all(key in keys for key in form.values())), (None, None))
    if kind is None:
        return None, None
    named = form | {key: key for key in KINDS[kind] if key not in form}
    if kind == "pairs":
        named["neg"] = sorted(filter(NEGATIVES.fullmatch, keys), key=lambda key: (len(key), key))
    return kind, named


def _value(row, name):
    """The value of a column. If there is none of this name, a dotted name reaches within one; None for nothing."""
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
                # a passage of Tevatron, joined as Tevatron does
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
    """What the record probably lacks, by the form that shares most keys with it."""
    likeness = [len(set(form.values()) & row.keys()) for _, form in FORMS]
    if not max(likeness):
        known = ", ".join(str(list(keys)) for keys in KINDS.values())
        return f"found keys {sorted(row)}; expected one of {known} (docs/data.md), or their names in the config"
    kind, form = FORMS[likeness.index(max(likeness))]
    lacking = [key for key in form.values() if key not in row]
    return (
        f"key {lacking[0]!r} is missing from a {kind} record with keys {sorted(row)}; "
        f"add it, or name the columns in the config"
    )
