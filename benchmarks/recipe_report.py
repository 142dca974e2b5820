"""What the rows of benchmarks/recipe.py say: differences between arms, seed by seed, with 95% intervals, beside the
paper's own."""

import json
import os
from typing import NamedTuple

import numpy as np
from scipy.stats import t

METRICS = {
    "docs.ndcg@10": "docs nDCG@10",
    "cross_lingual.recall@20": "cross-lingual R@20",
    "sts.docs.spearman": "STS docs",
    "sts.messages.spearman": "STS messages",
    "classification.accuracy": "classification",
}
ENGLISH, MULTI, *_ = METRICS  # which of ours the paper's MTEB scores are compared with


def name_of(soft_mask, cross_lingual, dhnm):
    """The arm with these of the paper's ideas."""
    return (
        " + ".join(name for name, has in (("SM", soft_mask), ("CLR", cross_lingual), ("DHNM", dhnm)) if has) or "none"
    )


ALL = name_of(True, True, True)


def _pairs(idea):
    """(arm with it, arm without), for each combination of the other two ideas."""
    others = [(a, b) for a in (True, False) for b in (True, False)]
    place = lambda pair, on: name_of(*pair[:idea], on, *pair[idea:])
    return [(place(pair, True), place(pair, False)) for pair in others]


class Comparison(NamedTuple):
    """The first arm of each pair less the second; the paper's own difference in points (arXiv 2509.12892, tables 5 and
    6), or None."""

    name: str
    pairs: list
    english: float | None = None
    multi: float | None = None
    said: str = ""  # what the paper says without a number
    prefix: str = ""  # of the metrics


COMPARISONS = [
    # the paper has six of the eight arms: SM in (SM + CLR) - CLR and (SM + DHNM) - DHNM, the others likewise, averaged
    Comparison("soft mask, else bidirectional from the start", _pairs(0), 1.24, 1.49),
    Comparison("cross-lingual data, else English alone", _pairs(1), 1.24, 2.43),
    Comparison("dynamic hard negatives, else the first 7", _pairs(2), 1.88, 1.01),
    Comparison("soft mask, beside the other two", [(ALL, name_of(False, True, True))]),
    Comparison("cross-lingual data, beside the other two", [(ALL, name_of(True, False, True))], 0.74, 2.14),
    Comparison("dynamic hard negatives, beside the other two", [(ALL, name_of(True, True, False))], 1.38, 0.72),
    Comparison("all three, else none", [(ALL, "none")]),
    Comparison("soft mask, else bidirectional after masked next tokens (LLM2Vec)", [(ALL, "LLM2Vec")]),
    Comparison("both after masked next tokens: soft mask, else bidirectional", [("LLM2Vec, soft mask", "LLM2Vec")]),
    Comparison("masked next tokens before the soft mask, else none", [("LLM2Vec, soft mask", ALL)]),
    Comparison("soft mask, else bidirectional from the start: LoRA", [("LoRA", "LoRA, open")], 0.57),
    Comparison("hidden states evened out at the start (init_whiten), else as they came", [("whitened", ALL)]),
    Comparison("all weights, else LoRA", [(ALL, "LoRA")], 1.12),
    Comparison("linear schedule, else accelerating", [(ALL, "accelerating")], said="linear is best"),
    Comparison("linear schedule, else decelerating", [(ALL, "decelerating")], said="linear is best"),
    Comparison("linear schedule, else causal until the last stage", [(ALL, "causal")]),
    Comparison("column mask, else row", [(ALL, "row")]),
    Comparison("column mask, else uniform", [(ALL, "uniform")]),
    Comparison("7 mined negatives, else none", [(name_of(True, True, False), "no hard negatives")]),
    Comparison("7 mined negatives, else 7 random ones", [(name_of(True, True, False), "random negatives")]),
    Comparison("bounds by quantile, else by cosine", [("quantiles", ALL)]),
    Comparison("documents nearer than the positive by 0.1 left out, else all in", [("margin", ALL)]),
    Comparison("both ways, else queries find documents alone", [("symmetric", ALL)]),
    Comparison("other queries are negatives, too, else documents alone", [("same side", ALL)]),
    Comparison("both ways with both sides' negatives, else neither", [("symmetric, same side", ALL)]),
    Comparison("STS in the same step, else alternating", [(ALL, "alternating")], said="in the same step is better"),
    Comparison("STS in the same step, else none", [(ALL, "no STS")]),
    Comparison("a tenth of beta, else no STS", [("light STS", "no STS")]),
    Comparison("STS of translations, else none", [("translations", "no STS")]),
    Comparison("STS of translations by a tenth of beta, else none", [("light translations", "no STS")]),
    Comparison("a teacher's scores by KL, else none", [("KL", ALL)]),
    Comparison("a teacher's scores by margin MSE, else none", [("margin MSE", ALL)]),
    Comparison("a teacher's vectors of texts, else none", [("vectors", ALL)]),
    Comparison("tokens weighted by rarity, else equal", [(ALL, "equal weights")]),
]  # fmt: skip


def comparisons(rows):
    """Those of COMPARISONS, and of each Matryoshka dim, for which the rows have a seed."""
    dims = sorted({int(key.split(".")[1]) for row in rows for key in row if key.startswith("dims.")})
    of_dims = [
        Comparison(f"Matryoshka, else the whole alone: at {dim}", [(ALL, "no Matryoshka")], prefix=f"dims.{dim}.")
        for dim in dims
    ]
    return [one for one in [*COMPARISONS, *of_dims] if difference(rows, one, ENGLISH)]


def difference(rows, comparison, metric):
    """(mean, half of the 95% interval, seeds) of the paired differences over the seeds that have all arms: a seed's is
    the mean over the pairs. None without a seed; the interval is NaN with one."""
    key = f"{comparison.prefix}{metric.removeprefix('docs.') if comparison.prefix else metric}"
    score = {(row["arm"], row["seed"]): row[key] for row in rows}
    seeds = [
        seed
        for seed in sorted({row["seed"] for row in rows})
        if all((arm, seed) in score for pair in comparison.pairs for arm in pair)
    ]
    if not seeds:
        return None
    found = np.array([np.mean([score[a, seed] - score[b, seed] for a, b in comparison.pairs]) for seed in seeds])
    n = len(found)
    half = t.ppf(0.975, n - 1) * found.std(ddof=1) / n**0.5 if n > 1 else np.nan
    return found.mean(), half, n


def verdict(found, papers):
    """Of a difference with its interval, and the paper's, of which only the sign counts: a word or two."""
    if found is None or np.isnan(found[1]):
        return "too few seeds"
    mean, half, _ = found
    if abs(mean) <= half:
        return "not seen at this scale"
    if papers is None:
        return "helps here" if mean > 0 else "harms here"
    return "confirmed here" if mean * papers > 0 else "contradicted here"


def verdicts(one, english, multi):
    """Of a Comparison's two differences that the paper has."""
    sign = 1 if one.said else None  # each is said of the first
    return verdict(english, one.english or sign), verdict(multi, one.multi or sign)


def shown(found):
    """A difference with its interval, as text."""
    return "" if found is None else f"{found[0]:+.4f}" + ("" if np.isnan(found[1]) else f" ± {found[1]:.4f}")


def papers(one):
    """What the paper has on a Comparison, as text."""
    return one.said or ", ".join(f"{points:+.2f}" for points in (one.english, one.multi) if points is not None)


def table(rows):
    """Markdown."""
    lines = [
        "| the first, less the second | "
        + " | ".join(METRICS.values())
        + " | paper, points: Eng, Multi | docs | cross-lingual |",
        "|---" * (len(METRICS) + 4) + "|",
    ]
    for one in comparisons(rows):
        found = {metric: difference(rows, one, metric) for metric in METRICS}
        cells = [shown(f) for f in found.values()]
        lines.append(
            f"| {one.name} | " + " | ".join([*cells, papers(one), *verdicts(one, found[ENGLISH], found[MULTI])]) + " |"
        )
    arms = dict.fromkeys(row["arm"] for row in rows)
    lines += [
        "",
        "| arm | seeds | " + " | ".join(METRICS.values()) + " | negatives replaced | seconds a run, median |",
        "|---" * (len(METRICS) + 4) + "|",
    ]
    for arm in arms:
        mine = [row for row in rows if row["arm"] == arm]
        mean = lambda key: np.mean([row[key] for row in mine])
        lines.append(
            f"| {arm} | {len(mine)} | "
            + " | ".join(f"{mean(metric):.4f}" for metric in METRICS)
            + f" | {mean('replaced'):,.0f} | {np.median([row['seconds'] for row in mine]):.0f} |"
        )
    return "\n".join(lines)


def draw(rows, path):
    """Each comparison's difference with its interval, on the two metrics that the paper's are compared with."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    those = comparisons(rows)
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.32 * len(those) + 1.2), sharey=True)
    for axis, metric in zip(axes, (ENGLISH, MULTI)):
        for place, one in enumerate(those):
            found = difference(rows, one, metric)
            if found is not None:
                mean, half, _ = found
                axis.errorbar(
                    mean,
                    -place,
                    xerr=None if np.isnan(half) else half,
                    fmt="o",
                    markersize=4,
                    capsize=2,
                    color="C3" if mean < -half else "C2" if mean > half else "0.5",
                )
        axis.axvline(0, color="0.7", linewidth=0.8)
        axis.set(title=METRICS[metric], xlabel="difference, 95% interval over seeds")
    axes[0].set_yticks([-place for place in range(len(those))], [one.name for one in those], fontsize=8)
    figure.tight_layout()
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    os.replace(partial, path)
    plt.close(figure)


def write(rows, out):
    """The rows, and beside them the table and the figure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text('{"rows": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]}\n")
    os.replace(partial, out)
    out.with_suffix(".md").write_text(table(rows) + "\n")
    draw(rows, out.with_suffix(".png"))
