"""The place of a text that has most words of a query."""

from __future__ import annotations

from collections.abc import Iterable

MOST = 64  # occurrences of a word that are looked at


def snippet(text: str, words: Iterable[str], room: int) -> str:
    """At most about `room` characters of a text, on one line; dots stand for what is left out. words: in lower case."""
    text = " ".join(text.split())
    if len(text) <= room:
        return text
    lower = text.lower()
    places = sorted((at, word) for word in set(words) for at in _places(lower, word))
    best, start = 0, 0
    for first, (at, _) in enumerate(places):
        within = {word for place, word in places[first:] if place + len(word) <= at + room - room // 4}
        if len(within) > best:
            best, start = len(within), at
    # between words, or anywhere in a script without spaces
    start = 0 if start < room // 4 else start - room // 8
    start = text.rfind(" ", max(0, start - room // 8), start) + 1 or start
    end = len(text) if len(text) - start <= room else text.rfind(" ", start + room // 2, start + room)
    end = start + room if end < 0 else end
    return ("… " if start else "") + text[start:end] + (" …" if end < len(text) else "")


def _places(text, word):
    at = -1
    for _ in range(MOST):
        at = text.find(word, at + 1)
        if at < 0:
            return
        if not at or not word[0].isascii() or not text[at - 1].isalnum():  # where a word begins
            yield at
