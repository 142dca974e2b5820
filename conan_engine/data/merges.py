"""The scores of a sentencepiece model as the merges of the `tokenizers` library."""

from __future__ import annotations


def merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The pair of pieces that each piece is made of, the best piece first: [(left, right), ...] from {piece: score}.

    sentencepiece joins whatever neighbours make the best piece, leftmost first; `tokenizers` has pairs, each with a
    rank of its own, and would join one pair of a piece before another one of it wherever they stand. But a piece is
    only ever made in one way: what happens within a stretch of text that becomes one piece happens to that stretch
    alone too, as a merge across its ends would keep it from becoming one. So each piece needs the last pair alone of
    what it is made of by itself.
    """
    found = []
    for piece in sorted((piece for piece in scores if len(piece) > 1), key=scores.__getitem__, reverse=True):
        parts = list(piece)
        while len(parts) > 2 and (
            pairs := [(-scores[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in scores]
        ):
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
    return found
