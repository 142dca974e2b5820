"""Convert the scores of a sentencepiece model into the merges of the `tokenizers` library."""

from __future__ import annotations


def merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The pair of pieces that each piece is made of, best piece first: [(left, right), ...] from {piece: score}.

    sentencepiece joins the neighbours that make the best piece, leftmost first. `tokenizers` has ranked pairs, and
    would join all places of one pair before another pair that makes the same piece. But each piece is only ever made in
    one way: the merges within a stretch of text that becomes one piece also happen to that stretch alone, since a merge
    across its ends would keep it from becoming one. So each piece needs only the last pair of its own construction.
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
