"""Does each of the paper's ideas help? Train with and without it, on several seeds, and compare seed by seed.

    python benchmarks/recipe.py [--config configs/recipe.toml] [--seeds 5] [--hours H] [--arm ARM ...]
        [--teacher FOLDER] [--tasks FILE] [--out DIR] [--name NAME]

An arm is the config with some settings changed. The arms of a seed share what they have in common: language modelling,
and the weak stage where only the supervised one differs. configs/recipe.toml starts from nothing, for CPUs;
configs/recipe-smollm.toml from a real language model, for a GPU; configs/recipe-smollm-cpu.toml from its first layers.
Each arm's row goes to --out (benchmarks/results/, named as the config) as it comes; after --hours no new arm begins,
and the same command goes on behind the rows that are there. --teacher: a sentence-transformers model, of whose arms
there are three more, with as many texts' vectors as pairs a step, and its scores of docstrings alone. --tasks: a file
of gpu/pack.py, where the packages with the texts are not installed; --seeds 0: write the files of pairs that the config
names, and train nothing. Ends with what the rows say so far, a .md and a .png.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import measured
import recipe_report
import torch
import training

from conan_engine import command, errors
from conan_engine.data import build
from conan_engine.data.sources import installed
from conan_engine.evaluation import tasks
from conan_engine.evaluation.encoder import Encoder
from conan_engine.run import checkpoint
from conan_engine.settings import load

ROOT = Path(__file__).resolve().parent.parent
PAIRS = 1500  # of a source, that the supervised stage trains on
OPEN = ["--weak.alpha=open"]
NO_DHNM = ["--negatives.low=-1", "--negatives.bound=-1"]  # no cosine is below: the first 7 for ever
WHITENED = ["--init_whiten=0.25", "--weak.lr=5e-4"]  # the step that an even start bears
LORA = ["--lora.rank=64", "--lora.alpha=64"]  # the paper's rank (table 6)

FACTORS = {recipe_report.name_of(*on): on for on in itertools.product((True, False), repeat=3)}
# What is trained first, on all seeds, most telling first; the arms that are in none come last.
ROUNDS = [
    [recipe_report.ALL, "CLR + DHNM", "LLM2Vec", "LLM2Vec, soft mask", "causal"],
    [
        "SM + CLR",
        "no hard negatives",
        "random negatives",
        "quantiles",
        "alternating",
        "no STS",
        "light STS",
        "translations",
        "light translations",
    ],
    [
        "whitened",
        "LoRA",
        "LoRA, open",
        "no Matryoshka",
        "SM + DHNM",
        "margin",
        "symmetric",
        "symmetric, same side",
        "same side",
    ],
    ["row", "uniform", "accelerating", "decelerating"],
]
STAGES = {"weak": ("weak", "init_whiten"), "supervised": ("supervised", "negatives")}  # what changes what


def arms(config, teacher=None):
    """{arm: the settings that it changes}, by rounds."""
    no_cross_lingual = [
        f"--{table}.{source}=0"
        for table, sources in (
            ("weak.data", config.weak.data),
            ("supervised.data", config.supervised.data),
            ("supervised.sts", config.supervised.sts),
        )
        for source in sources
        if "catalogues" in source
    ]
    whole = config.weak.dims[-1]
    found = {
        arm: [change for idea, has in zip((OPEN, no_cross_lingual, NO_DHNM), on) if not has for change in idea]
        for arm, on in FACTORS.items()
    } | {
        "accelerating": ["--weak.alpha=accelerating"],
        "decelerating": ["--weak.alpha=decelerating"],
        "causal": ["--weak.alpha=closed"],
        "row": ["--weak.mask=row"],
        "uniform": ["--weak.mask=uniform"],
        "no Matryoshka": [f"--weak.dims=[{whole}]", f"--supervised.dims=[{whole}]"],
        "no hard negatives": ["--negatives.count=0"],
        "random negatives": ["--negatives.index=random", *NO_DHNM],
        "symmetric": ["--weak.symmetric=true", "--supervised.symmetric=true"],
        "same side": ["--weak.same_side=true", "--supervised.same_side=true"],
        "symmetric, same side": [
            f"--{stage}.{key}=true" for stage in ("weak", "supervised") for key in ("symmetric", "same_side")
        ],
        "margin": ["--weak.margin=0.1", "--supervised.margin=0.1"],
        "quantiles": ["--negatives.bounds=quantile", "--negatives.low=0.1"],
    }
    if config.supervised.sts:
        translations, light = '--supervised.sts={"catalogues.translations" = 1}', "--supervised.beta=0.08"
        found |= {"alternating": ["--supervised.balance=alternating"], "no STS": ["--supervised.sts={}"]}
        found |= {"light STS": [light], "translations": [translations], "light translations": [translations, light]}
    if teacher:
        scores = [
            f"--supervised.teacher=sentence-transformers:{teacher}",
            f"--supervised.distil_temperature={config.supervised.temperature}",
        ]
        scores += [
            f"--supervised.data.{source}={{ weight = {about.weight}, distil = false }}"
            for source, about in config.supervised.data.items()
            if not english(source)
        ]
        vectors = [
            "--weak.distil=cosine",
            f"--weak.distil_teacher=sentence-transformers:{teacher}",
            "--weak.texts={ docstrings = 1 }",
            f"--weak.texts_batch={config.weak.batch}",
        ]
        found |= {
            "KL": ["--supervised.distil=kl", *scores],
            "margin MSE": ["--supervised.distil=margin_mse", "--supervised.distil_weight=20", *scores],
            "vectors": vectors,
        }
    if config.init_from:
        masked = ["--pretrain.masked=0.2"]
        found |= {"LLM2Vec": [*masked, *OPEN], "LLM2Vec, soft mask": masked, "LoRA": LORA, "LoRA, open": [*LORA, *OPEN]}
        found |= {"whitened": WHITENED}
    else:
        found |= {"equal weights": ["--token_weights=equal"]}
    return {arm: found[arm] for arm in sorted(found, key=round_of)}


def english(source):
    return "docstrings" in source and "labels" not in source


def round_of(arm):
    return next((i for i, those in enumerate(ROUNDS) if arm in those), len(ROUNDS))


class Leg(NamedTuple):
    """One run on the way to an arm's model."""

    folder: Path
    start: Path | None  # the run that it starts from; None: what the config says
    stages: list
    changes: list


def legs(changes, config, work, seed):
    """The runs that make an arm's model, each from the one before. What two arms have in common is in one folder."""
    first = [change for change in changes if change.startswith(("--pretrain.", "--token_weights"))]
    rest = [change for change in changes if change not in first]
    if any(change.startswith("--lora.") for change in rest):  # the same adapters in both stages
        split = [(["weak", "supervised"], rest)]
    else:
        split = [
            ([stage], [change for change in rest if re.split("[.=]", change[2:])[0] in keys])
            for stage, keys in STAGES.items()
        ]
    if not config.init_from:
        split.insert(0, (["pretrain", "sft"], first))
    elif first:
        split.insert(0, (["pretrain"], first))
    found, way = [], []
    for stages, mine in split:
        way += [stages, mine]
        name = f"{seed}-{'-'.join(stages)}-{hashlib.blake2b(json.dumps(way).encode(), digest_size=4).hexdigest()}"
        found.append(Leg(work / name, found[-1].folder if found else None, stages, mine))
    return found


def train(path, leg, work, seed):
    """Train a leg, or go on, unless it is done; its log is beside it."""
    if (leg.folder / "done").exists():
        return
    start = [f"--init_from={leg.start}"] if leg.start else []
    stages = f"--stages=[{', '.join(map(repr, leg.stages))}]"
    log = leg.folder.with_suffix(".log")
    try:
        training.run(path, leg.folder, stages, *start, f"--seed={seed}", *leg.changes, share=work, log=log)
    except BaseException:
        print(
            f"{leg.folder}: the training ended early; {log}:\n"
            + log.read_text(encoding="utf-8").replace("\r", "\n")[-2000:]
        )
        raise
    (leg.folder / "done").touch()


def some_pairs(config, work):
    """The config's files of pairs, NAME.jsonl under its folder: some of the source NAME's, by their hashes."""
    for path in map(Path, config.supervised.data):
        if path.parent == work and not path.exists():
            _, records = build.read(path.stem, "supervised")
            chosen = sorted(records, key=lambda record: installed.fraction(record["input"]))[:PAIRS]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(record) + "\n" for record in chosen))
            os.utime(partial, (0, 0))  # its shards are known by it, also where it was unpacked
            partial.replace(path)


def scores(run, given, dims):
    """Of a trained run, the numbers of a row."""
    encoder = Encoder.load(run)
    encoder.model.precision = checkpoint.newest(run)[1]["precision"]  # as trained: float32 takes longer on some CPUs
    found = tasks.measure(tasks.Embedded(encoder.encode, given), given, dims)
    for prefix in ("", *(f"dims.{dim}." for dim in dims)):
        found[f"{prefix}cross_lingual.recall@20"] = sum(
            found[f"{prefix}cross_lingual.{language}.recall@20"] for language in tasks.LANGUAGES
        ) / len(tasks.LANGUAGES)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["replaced"] = metrics[-1].get("replaced", 0)
    return {key: round(value, 6) for key, value in found.items()}


def main():
    parser = measured.Parser(__doc__)
    parser.set_defaults(out=ROOT / "benchmarks/results")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/recipe.toml")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--hours", type=float, default=float("inf"))
    parser.add_argument("--arm", action="append", metavar="ARM", help="only this one; may be given several times")
    parser.add_argument("--teacher", type=Path, metavar="FOLDER")
    parser.add_argument("--tasks", metavar="FILE")
    parser.add_argument("--name", help="of the files in --out (default: the config's)")
    arguments = parser.parse_args()
    path = arguments.config.resolve()
    out = (arguments.out / f"{arguments.name or path.stem}.json").resolve()
    teacher = arguments.teacher and arguments.teacher.resolve()
    given, began = arguments.tasks and tasks.load(Path(arguments.tasks).resolve()), time.monotonic()
    os.chdir(ROOT)
    config = load(path)
    changes, work = arms(config, teacher), Path(config.out_dir)
    for arm in arguments.arm or ():
        if arm not in changes:
            raise errors.UserError(f"--arm: {arm!r} is none of {', '.join(changes)}")
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    done = {(row["arm"], row["seed"]) for row in rows}
    todo = [
        (arm, seed)
        for arm in arguments.arm or changes
        for seed in range(1, arguments.seeds + 1)
        if (arm, seed) not in done
    ]
    todo.sort(key=lambda one: (round_of(one[0]), one[1]))  # stable: of a round, seed by seed
    commit, device = measured.commit(), "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"
    (work / "data").mkdir(parents=True, exist_ok=True)
    some_pairs(config, work)
    while todo and time.monotonic() - began <= arguments.hours * 3600:
        arm, seed = todo.pop(0)
        way, seconds = legs(changes[arm], config, work, seed), 0.0
        for leg in way:
            train(path, leg, work, seed)
            if leg.stages[0] not in ("pretrain", "sft"):
                seconds += checkpoint.newest(leg.folder)[1]["seconds"]
        given = given or tasks.load()
        factors = dict(zip(("soft_mask", "cross_lingual", "dhnm"), FACTORS.get(arm, ())))
        about = {
            "changes": changes[arm],
            "seconds": round(seconds, 1),
            "commit": commit,
            "machine": measured.machine(device),
        }
        rows.append({"arm": arm, **factors, "seed": seed, **scores(way[-1].folder, given, config.weak.dims), **about})
        recipe_report.write(rows, out)
        print(
            f"{arm}, seed {seed}: docs {rows[-1]['docs.ndcg@10']:.4f}, cross-lingual "
            f"{rows[-1]['cross_lingual.recall@20']:.4f}, {seconds:.0f} s",
            flush=True,
        )
        wanted = {leg.folder for other, its in todo for leg in legs(changes[other], config, work, its)}
        for leg in way:
            if leg.folder not in wanted:
                shutil.rmtree(leg.folder)
    print(recipe_report.table(rows))


if __name__ == "__main__":
    command.run(main)
