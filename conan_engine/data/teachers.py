"""Teachers for the weak stage: callables that score (queries, documents) in [0, 1]. Name your own as
weak.teacher = "module:function"."""


def plausible(queries, documents):
    """Whether a pair can be a text and its counterpart at all, from its form alone: 0 for a copy or for fewer than four
    characters on a side, else the shorter length over the longer, where a document may be up to 20 times the query."""
    return [_score(query.strip(), document.strip()) for query, document in zip(queries, documents)]


def _score(query, document):
    if query == document or len(query) < 4 or len(document) < 4:
        return 0.0
    ratio = len(document) / len(query)
    if 1 / 4 <= ratio <= 20:  # a Chinese sentence is about a third as long, in characters, as its English original
        return 1.0
    return min(ratio * 4, 20 / ratio)
