"""Does each of the paper's ideas help? Train with and without it, on several seeds, and compare seed by seed.

    python benchmarks/recipe.py [--seeds 5] [--hours H] [--arm ARM ...] [--out benchmarks/results/recipe.json]

An arm is benchmarks/recipe.toml with some settings changed; the arms of a seed share its language-modelling stages. Each
run's row goes to --out as it comes; after --hours no new run begins, and the same command goes on behind the rows that are
there. Ends with what they say so far: recipe.md and recipe.png beside --out. Works in runs/recipe, about 1 GB.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import measured
import recipe_report

from conan_engine import checkpoint, tasks
from conan_engine.data import prepare
from conan_engine.data.sources import installed
from conan_engine.encoder import Encoder

ROOT = Path(__file__).resolve().parent.parent
WORK = Path("runs/recipe")
DIMS = list(recipe_report.DIMS)
PAIRS = 1500  # of a source, that the supervised stage trains on

# what to change for an arm without the idea
NO_SOFT_MASK = ["--weak.alpha=open"]
NO_CROSS_LINGUAL = ["--weak.data.catalogues=0", f"--supervised.data.{WORK}/catalogues.jsonl=0", "--supervised.sts.catalogues.sts=0"]
NO_DHNM = ["--negatives.low=-1", "--negatives.bound=-1"]  # no cosine is below: the first 7 for ever

FACTORS = {recipe_report.name_of(*on): on for on in itertools.product((True, False), repeat=3)}
ARMS = {
    arm: [change for idea, has in zip((NO_SOFT_MASK, NO_CROSS_LINGUAL, NO_DHNM), on) if not has for change in idea] for arm, on in FACTORS.items()
} | {
    "accelerating": ["--weak.alpha=accelerating"],
    "decelerating": ["--weak.alpha=decelerating"],
    "causal": ["--weak.alpha=closed"],
    "row": ["--weak.mask=row"],
    "uniform": ["--weak.mask=uniform"],
    "no Matryoshka": [f"--weak.dims=[{DIMS[-1]}]", f"--supervised.dims=[{DIMS[-1]}]"],
    "no hard negatives": ["--negatives.count=0"],
    "random negatives": ["--negatives.index=random", *NO_DHNM],
    "alternating": ["--supervised.balance=alternating"],
    "no STS": ["--supervised.sts.docstrings.sts=0", "--supervised.sts.catalogues.sts=0"],
    "quantiles": ["--negatives.bounds=quantile", "--negatives.low=0.1"],
    "equal weights": ["--token_weights=equal"],
}  # fmt: skip


def train(run, *settings):
    """Train, or go on; the run's log is beside it."""
    run.mkdir(parents=True, exist_ok=True)
    data = run / "data"
    if not data.exists():
        data.symlink_to((WORK / "data").resolve())  # the shards of all runs
    command = [sys.executable, ROOT / "conan_engine/train.py", ROOT / "benchmarks/recipe.toml", f"--out_dir={run}", *settings]
    with open(run.with_suffix(".log"), "w") as log:
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode:
            sys.exit(f"{run}: the training failed:\n" + Path(log.name).read_text().replace("\r", "\n")[-2000:])


def some_pairs():
    """The two files of pairs: some of a source's, by their hashes."""
    for source in ("docstrings", "catalogues"):
        path = WORK / f"{source}.jsonl"
        if not path.exists():
            _, records = prepare.read(source, "supervised")
            chosen = sorted(records, key=lambda record: installed.fraction(record["input"]))[:PAIRS]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(record) + "\n" for record in chosen))
            os.replace(partial, path)


def scores(run, given):
    """Of a trained run, the numbers of a row."""
    encoder = Encoder.load(run)
    found = tasks.measure(tasks.Embedded(encoder.encode, given), given, DIMS)
    for prefix in ("", *(f"dims.{dim}." for dim in DIMS)):
        found[f"{prefix}cross_lingual.recall@20"] = sum(found[f"{prefix}cross_lingual.{language}.recall@20"] for language in tasks.LANGUAGES) / len(tasks.LANGUAGES)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["replaced"] = metrics[-1].get("replaced", 0)
    return {key: round(value, 6) for key, value in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--hours", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/recipe.json")
    parser.add_argument("--arm", action="append", choices=ARMS, help="only this one; may be given several times")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    os.chdir(ROOT)
    began, given = time.monotonic(), None
    rows = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    done = {(row["arm"], row["seed"]) for row in rows}
    commit = measured.commit()
    (WORK / "data").mkdir(parents=True, exist_ok=True)
    some_pairs()
    for seed, arm in itertools.product(range(1, arguments.seeds + 1), arguments.arm or ARMS):
        if (arm, seed) in done:
            continue
        changes = ARMS[arm]
        if time.monotonic() - began > arguments.hours * 3600:
            break
        weights = [change for change in changes if change.startswith("--token_weights")]
        start, run = WORK / f"lm-{seed}{'-equal' if weights else ''}", WORK / f"arm-{seed}"
        if not (start / "done").exists():
            train(start, "--stages=['pretrain', 'sft']", f"--seed={seed}", *weights)
            (start / "done").touch()
        whose = run / "arm"
        if run.exists() and (not whose.exists() or whose.read_text() != arm):
            shutil.rmtree(run)  # of an arm that another start of this finished, or of none
        run.mkdir(exist_ok=True)
        whose.write_text(arm)
        train(run, "--stages=['weak', 'supervised']", f"--init_from={start}", f"--seed={seed}", *changes)
        given = given or tasks.load()
        factors = dict(zip(("soft_mask", "cross_lingual", "dhnm"), FACTORS.get(arm, ())))
        _, state = checkpoint.newest(run)
        made = {"changes": changes, "seconds": round(state["seconds"], 1), "commit": commit, "machine": measured.processor()}
        rows.append({"arm": arm, **factors, "seed": seed, **scores(run, given), **made})
        recipe_report.write(rows, arguments.out)
        print(f"{arm}, seed {seed}: docs {rows[-1]['docs.ndcg@10']:.4f}, cross-lingual {rows[-1]['cross_lingual.recall@20']:.4f}, {rows[-1]['seconds']:.0f} s", flush=True)
        shutil.rmtree(run)
    print(recipe_report.table(rows))


if __name__ == "__main__":
    main()
