"""What a results.json says: the names of its scores, and the table that a terminal shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conan_engine.evaluation import tasks
from conan_engine.vectors.quantize import BITS

SMALLER = [precision for precision in BITS if precision != "float32"]
NAMES = {
    "docs.ndcg@10": "docs nDCG@10",
    **{f"cross_lingual.{language}.recall@20": f"{language} -> en Recall@20" for language in tasks.LANGUAGES},
    "sts.docs.spearman": "STS docs Spearman",
    "sts.messages.spearman": "STS messages Spearman",
    "classification.accuracy": "classification accuracy",
}


def of(name: str, key: str) -> str:
    """The key of a baseline's score: docs.bm25.ndcg@10, dims.64.random_projection.ndcg@10."""
    parts = key.split(".")
    first = 2 if parts[0] == "dims" else 1
    return ".".join([*parts[:first], name, *parts[first:]])


def table(results: dict[str, Any], dims: Sequence[int], other: dict | None = None) -> str:
    """The results as lines of text. other: (name, results) of another model, for a column of its own."""
    columns = [("this model", lambda key: results.get(key)), ("BM25", lambda key: results.get(of("bm25", key)))]
    columns += [("random", lambda key: results.get(of("random_projection", key)))]
    if other:
        columns += [(other[0], lambda key: other[1].get(key))]
    lines = [
        "",
        f"{'':28}" + "".join(f"{name[:11]:>12}" for name, _ in columns) + "".join(f"{f'dim {d}':>9}" for d in dims),
    ]

    def by_dim(found, key):
        return "".join(_cell(found.get(key.format(d)), 9) for d in dims)

    for key, name in NAMES.items():
        dim_key = f"dims.{{}}.{key.removeprefix('docs.')}"
        lines.append(f"{name:28}" + "".join(_cell(score(key), 12) for _, score in columns) + by_dim(results, dim_key))
        if key == "docs.ndcg@10":
            blank = " " * 12 * len(columns)
            lines.append(f"{'  random projection':28}{blank}{by_dim(results, of('random_projection', dim_key))}")
            if other:
                lines.append(f"{f'  {other[0]}':28.28}{blank}{by_dim(other[1], dim_key)}")
            for precision in SMALLER:
                name = f"  documents {precision}, 1/{BITS['float32'] // BITS[precision]}"
                lines.append(f"{name:28}{blank}{by_dim(results, f'dims.{{}}.{precision}.ndcg@10')}")
    took = ", ".join(
        f"{results[f'seconds.{part}']:.0f} s {said}"
        for part, said in (("train", "of training"), ("evaluate", "of evaluation"))
    )
    return "\n".join(
        [*lines, f"\n{results['params'] / 1e6:.1f}M parameters, {results['docs.queries']:,} held-out docs; {took}"]
    )


def _cell(score, width):
    return " " * width if score is None else f"{score:{width}.3f}"
