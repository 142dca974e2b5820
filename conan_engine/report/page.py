"""Write RUN/report.html from what the run's folder holds."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from markupsafe import Markup

from conan_engine import atomic
from conan_engine.config import STAGES, Config
from conan_engine.errors import UserError
from conan_engine.evaluation.encoder import Encoder
from conan_engine.evaluation.scores import NAMES, of
from conan_engine.evaluation.tasks import LANGUAGES
from conan_engine.report import curves, samples
from conan_engine.report.charts import Curve, bars, chart, chart_of_points, short
from conan_engine.run import checkpoint, versions
from conan_engine.run.log import json_object, rows
from conan_engine.run.resuming import leaves
from conan_engine.vectors.quantize import BITS

FILE = "report.html"
CROSS_LINGUAL = "cross_lingual.{}.recall@20"  # a key of results.json
OURS, BASELINE = "this model", "BM25"


def write(run: str | Path, encoder: Encoder | None = None) -> Path:
    """Write the report of a run, finished or not, and return its path.

    encoder: of the run's newest weights, if it is loaded already. What cannot be shown is left out, and the page says
    why. Raises UserError if `run` is not the folder of a run, or cannot be written.
    """
    run = Path(run)
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        steps = rows(run / "metrics.jsonl")
    except (OSError, ValueError):
        raise UserError(f"{run}: holds no metrics.jsonl and config.json; name the folder of a run") from None
    found, why = _samples(run, encoder)
    results = json_object(run / "results.json")
    stages = [
        curves.of_stage(name, config[name]["steps"], [row for row in steps if row["stage"] == name])
        for name in config["stages"]
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["short"] = short
    page = environment.get_template("page.html").render(
        run=run.resolve().name,
        written=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        state=_state(run, stages),
        facts=_facts(steps, results, stages),
        stages=[stage for stage in stages if stage.done],
        scores=_scores(results),
        score_charts=_score_charts(results),
        own_searches=[_own_search(path) for path in sorted(run.glob("retrieval-*.json"))],
        samples=found,
        no_samples=why,
        map=_map(found),
        settings=_settings(config),
        starts=versions.noted(run),
    )
    atomic.write(run / FILE, lambda file: file.write(page.encode("utf-8", "replace")))
    return run / FILE


def write_at_end(run: str | Path, say: Callable[[str], None]) -> None:
    """Write the report of a run that has just finished, and say where it is. A finished run is not failed by it."""
    try:
        say(f"report: {write(run)}")
    except Exception as error:
        say(f"{run}/{FILE} was not written ({type(error).__name__}: {error}); try python -m conan_engine.report {run}")


def _samples(run, encoder):
    """(Samples, "") or (None, why there are none)."""
    texts = json_object(run / samples.FILE)
    if not texts:
        return None, "This run keeps no pairs to search: no contrastive stage, or trained by an earlier version."
    if encoder is None:
        if not any(checkpoint.of_stage(run, stage) for stage in STAGES):
            return None, "There is no checkpoint yet."
        try:
            encoder = Encoder.load(run)
        except (UserError, OSError) as error:  # a run that trains removes its older checkpoints
            return None, f"The weights cannot be loaded: {error}"
        except torch.OutOfMemoryError:
            return None, "The device has no memory left for the weights; write the report again when it is free."
    return samples.Samples(texts, encoder), ""


def _state(run, stages):
    """How far the run is, in words."""
    last = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((run / "metrics.jsonl").stat().st_mtime))
    under_way = next((stage for stage in stages if stage.done < stage.steps), None)
    if under_way is None:
        return f"finished; metrics.jsonl was last written at {last}"
    return f"{under_way.name}: {under_way.done:,} of {under_way.steps:,} steps, the last one at {last}"


def _facts(steps, results, stages):
    """What stands at the head of the page: (what, value) each."""
    tokens, seconds = (sum(row.get(key, 0) for row in steps) for key in ("tokens", "seconds"))
    facts = [
        ("parameters", short(results["params"]) if "params" in results else None),
        ("steps", f"{sum(stage.done for stage in stages):,} of {sum(stage.steps for stage in stages):,}"),
        ("tokens read", short(tokens)),
        ("time in steps", _duration(seconds)),
    ]
    facts += [(f"tokens/s in {stage.name}", _median_rate(stage.name, steps)) for stage in stages if stage.done]
    facts += [(name, f"{results[key]:.3f}") for key, name in NAMES.items() if key in results and "lingual" not in key]
    languages = [results[key] for key in map(CROSS_LINGUAL.format, LANGUAGES) if key in results]
    facts += [("languages Recall@20, mean", f"{np.mean(languages):.3f}")] if languages else []
    return [(name, value) for name, value in facts if value is not None]


def _median_rate(name, steps):
    rates = [row["tokens_per_s"] for row in steps if row["stage"] == name and "tokens_per_s" in row]
    return short(float(np.median(rates))) if rates else None


def _duration(seconds):
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {int(seconds) % 60} s"


def _scores(results):
    """The score table: {"dims", "rows": (name, score, BM25's, random projection's, scores by dim) each}, or None."""
    dims = _dims(results)
    table = [
        (
            name,
            results[key],
            results.get(of("bm25", key)),
            results.get(of("random_projection", key)),
            [results.get(f"dims.{dim}.{key.removeprefix('docs.')}") for dim in dims],
        )
        for key, name in NAMES.items()
        if key in results
    ]
    return {"dims": dims, "rows": table} if table else None


def _dims(results):
    return sorted({int(key.split(".")[1]) for key in results if key.startswith("dims.")})


def _score_charts(results) -> list[Markup]:
    """Matryoshka dims and languages."""
    dims = _dims(results)

    def over_dims(name, key):
        having = [dim for dim in dims if key.format(dim) in results]
        return Curve(name, having, [results[key.format(dim)] for dim in having], True)

    by_precision = [
        over_dims(precision, f"dims.{{}}.{'' if precision == 'float32' else f'{precision}.'}ndcg@10")
        for precision in BITS
    ]
    by_task = [
        over_dims(name, f"dims.{{}}.{key}")
        for key, name in NAMES.items()
        if not key.startswith(("docs", "cross_lingual"))
    ]
    charts = [
        chart("docs nDCG@10 by Matryoshka dims and precision of the documents", by_precision, doubling=True),
        chart("other scores by Matryoshka dims", by_task, doubling=True),
    ]
    keys = {language: CROSS_LINGUAL.format(language) for language in LANGUAGES}
    languages = [
        (language, [results[key], results.get(of("bm25", key), 0.0)])
        for language, key in keys.items()
        if key in results
    ]
    if languages:
        charts.append(bars("language to English, Recall@20", languages, (OURS, BASELINE)))
    return [one for one in charts if one]


def _own_search(path):
    """A search on a person's own data, from retrieval-NAME.json: its name, counts, and scores by language."""
    results = json_object(path)
    metric = "ndcg@10"
    languages = sorted(
        key.removesuffix(f".{metric}") for key in results if key.endswith(f".{metric}") and "bm25" not in key
    )
    by_language = [
        (language, [results[f"{language}.{metric}"], results.get(f"{language}.bm25.{metric}", 0.0)])
        for language in languages
    ]
    return {
        "name": path.stem.removeprefix("retrieval-"),
        "queries": results.get("queries", 0),
        "documents": results.get("documents", 0),
        "rows": [
            (metric, results[metric], results.get(f"bm25.{metric}"))
            for metric in ("ndcg@10", "recall@20", "recall@100")
            if metric in results
        ],
        "chart": bars(f"{metric} by language", by_language, (OURS, BASELINE)) if len(languages) > 1 else "",
    }


def _map(found: samples.Samples | None) -> Markup:
    return chart_of_points("", found.dots, found.names) if found and found.dots else Markup("")


def _settings(config: dict[str, Any]) -> Sequence[tuple[str, str, bool]]:
    """(key, value, whether it differs from the default) of each setting."""
    defaults = dict(leaves(dataclasses.asdict(Config())))
    return [(key, str(value), defaults.get(key) != value) for key, value in leaves(config)]
