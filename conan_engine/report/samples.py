"""Sample searches and a map of texts, by a run's newest weights.

A run keeps the texts in RUN/samples.json when it starts, so that its folder is enough for a report.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conan_engine import atomic
from conan_engine.data.shards import order
from conan_engine.evaluation.validation import Pairs
from conan_engine.report.charts import Dot
from conan_engine.run.log import json_object

if TYPE_CHECKING:
    from conan_engine.config import Config
    from conan_engine.data.shards import Shards
    from conan_engine.data.tokenizer import AnyTokenizer
    from conan_engine.evaluation.encoder import Encoder

FILE = "samples.json"
RECORDS = 600  # of all sources together
TOKENS = 256  # a longer text is cut
GOOD, BAD, FOUND = 5, 5, 3  # searches that a report shows, and documents of each
POINTS = 400  # of a map


def keep(
    config: Config,
    tokenizer: AnyTokenizer,
    shards: dict[tuple[str, str], Shards],
    held_out: dict[str, dict[str, Shards]],
) -> None:
    """Write some pairs of the last contrastive stage that has any into RUN/samples.json: those of its validation, or
    if it has none, of its training.

    shards, held_out: as datasets.prepare gives them. The file has {"held_out", "sources": {source: {"queries",
    "documents", "right": the numbers of each query's right documents}}}. Raises UserError if it cannot be written.
    """
    for validated in (True, False):
        for name in ("supervised", "weak"):
            trained = {source: s for (use, source), s in shards.items() if use == name}
            pairs = {
                source: s
                for source, s in (held_out.get(name, {}) if validated else trained).items()
                if s.kind == "pairs"
            }
            if not pairs:
                continue
            of = {source: s.fingerprint for source, s in pairs.items()}
            path = Path(config.out_dir, FILE)
            if json_object(path).get("of") == of:
                return
            each = -(-RECORDS // len(pairs))
            found = {source: _texts(s, each, getattr(config, name), config, tokenizer) for source, s in pairs.items()}
            content = json.dumps({"held_out": validated, "of": of, "sources": found}, ensure_ascii=False).encode()
            atomic.write(path, lambda file, content=content: file.write(content))
            return


def _texts(shards, count, stage, config, tokenizer):
    records = order(0, 0, len(shards), np.arange(min(count, len(shards))))
    pairs = Pairs(shards, records, stage, config)
    tokens, bounds = pairs.tokens
    texts = [tokenizer.decode(tokens[start : min(end, start + TOKENS)]) for start, end in zip(bounds, bounds[1:])]
    right = [np.flatnonzero(row).tolist() for row in pairs.right]
    asked = [i for i, documents in enumerate(right) if documents]
    return {
        "queries": [texts[pairs.asked[i]] for i in asked],
        "documents": texts[len(records) :],
        "right": [right[i] for i in asked],
    }


class Samples:
    """What the weights of an Encoder find among the texts that `keep` wrote.

    Attributes: held_out, whether no stage trained on the texts; searches, a dict for each sample search; first, the
    share of all queries that find a right document first; queries, their number; dots and names, of a map.
    """

    def __init__(self, texts: dict[str, Any], encoder: Encoder) -> None:
        """texts: the content of the file."""
        self.held_out, self.names = texts["held_out"], list(texts["sources"])
        ranked, self.dots, vectors = [], [], []
        for colour, (source, own) in enumerate(texts["sources"].items()):
            queries, documents = (encoder.encode(own[name]) for name in ("queries", "documents"))
            ranked.append(_ranked(source, own, queries @ documents.T))
            for i in range(min(len(queries), POINTS // 2 // len(self.names))):
                best = own["right"][i][0]
                self.dots += [
                    Dot(0, 0, one_line(own["queries"][i], 120), colour, True),
                    Dot(0, 0, one_line(own["documents"][best], 120), colour, False),
                ]
                vectors += [queries[i], documents[best]]
        every = [search for of_source in ranked for search in of_source]
        self.queries = len(every)
        self.first = float(np.mean([search["rank"] == 1 for search in every])) if every else 0.0
        best = [[search for search in of_source if search["rank"] == 1] for of_source in ranked]
        worst = [
            sorted((s for s in of_source if s["rank"] > 1), key=lambda search: -search["rank"]) for of_source in ranked
        ]
        self.searches = _in_turn(best, GOOD) + _in_turn(worst, BAD)
        # where texts that a run trained on lie says little of others
        self.dots = _placed(self.dots, vectors) if self.held_out else []


def _ranked(source, texts, scores):
    """A dict for each query: the query, the rank of the best right document, and the first documents with scores."""
    documents, found = texts["documents"], []
    for query, right, of_query in zip(texts["queries"], texts["right"], scores):
        of_query = np.where([text == query for text in documents], -np.inf, of_query)  # a query does not find itself
        best = right[int(np.argmax(of_query[right]))]
        wrong = np.delete(of_query, right)
        found.append(
            {
                "source": source,
                "query": one_line(query),
                "rank": 1 + int((wrong >= of_query[best]).sum()),
                "of": len(documents),
                "answer": one_line(documents[best]),
                "score": float(of_query[best]),
                "found": [
                    {"text": one_line(documents[d]), "score": float(of_query[d]), "right": d in right}
                    for d in np.argsort(-of_query, kind="stable")[:FOUND].tolist()
                    if of_query[d] > -np.inf
                ],
            }
        )
    return found


def _in_turn(lists, count):
    """The first `count` of several lists, one of each in turn."""
    rows = [of[i] for i in range(max(map(len, lists), default=0)) for of in lists if i < len(of)]
    return rows[:count]


def _placed(dots, vectors):
    """The dots at places where similar texts are neighbours (t-SNE); none if there are fewer than five texts."""
    if len(dots) < 5:
        return []
    from sklearn.manifold import TSNE

    placed = TSNE(metric="cosine", init="random", perplexity=min(30, (len(dots) - 1) / 3), random_state=0)
    return [dot._replace(x=float(x), y=float(y)) for dot, (x, y) in zip(dots, placed.fit_transform(np.stack(vectors)))]


def one_line(text: str, most: int = 240) -> str:
    """A text on one line, its beginning if it is longer than `most` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"
