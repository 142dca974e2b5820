"""How fast did each stage of a run train, and how did its losses fall? From what the run has logged.

    python benchmarks/rates.py RUN [--out runs/benchmarks]

Prints a line a stage and writes rates.json, a row a stage: tokens a second (of the median step), the share of the
machine's matrix-product rate, the loss and what was measured on held-out records, step by step. The share counts 6 FLOP
a weight and token (the token table where it is the LM head) and nothing of attention, nor what gradient caching
computes twice: it is a lower bound. Run it where the run was trained.
"""

import itertools
import json
import statistics
from pathlib import Path

import measured
from step import gemm_rate

from conan_engine import command
from conan_engine.errors import UserError
from conan_engine.model.transformer import count_parameters
from conan_engine.parallel.device import choose
from conan_engine.run import checkpoint
from conan_engine.settings import from_dict

POINTS = 100  # of a stage's loss curve, each the mean of the steps up to it
LANGUAGE = ("pretrain", "sft")


def of_stage(name, steps, model, vocab, gemm):
    """The row of one stage. steps: its lines of metrics.jsonl."""
    seconds = statistics.median(step["seconds"] for step in steps[len(steps) // 4 :])
    tokens = sum(step["tokens"] for step in steps)
    rate = tokens / len(steps) / seconds
    weights = count_parameters(model, vocab) - (0 if name in LANGUAGE else vocab * model.width)
    row = {
        "stage": name,
        "steps": len(steps),
        "tokens": tokens,
        "seconds": sum(step["seconds"] for step in steps),
        "waited": sum(step["waited"] for step in steps),
    }
    row |= {"tokens_per_s": rate, "share": 6 * weights * rate / gemm, "curve": curve(steps)}
    held_out = [
        {"step": step["step"], **{key: value for key, value in step.items() if key.startswith("validation/")}}
        for step in steps
    ]
    return row | {"held_out": [one for one in held_out if len(one) > 1]}


def curve(steps):
    """[step, mean loss since the point before] of at most POINTS points."""
    size = -(-len(steps) // POINTS)
    pieces = (steps[start : start + size] for start in range(0, len(steps), size))
    return [[piece[-1]["step"], statistics.fmean(step["loss"] for step in piece)] for piece in pieces]


def main():
    parser = measured.Parser(__doc__)
    parser.add_argument("run", help="a run folder, such as runs/small")
    arguments = parser.parse_args()
    found = checkpoint.newest(arguments.run)
    if not found:
        raise UserError(
            f"{arguments.run}: no whole checkpoint; train one with torchrun conan_engine/train.py "
            f"--out_dir={arguments.run}"
        )
    settings = from_dict(found[1]["config"], arguments.run)
    device = choose(settings.device)
    gemm, vocab = gemm_rate(device), settings.model.vocab_size or settings.tokenizer.vocab_size
    parameters = count_parameters(settings.model, vocab)
    about = {
        "commit": measured.commit(),
        "machine": measured.machine(device.type),
        "run": arguments.run,
        "gemm_flops": gemm,
        "parameters": parameters,
    }
    rows = measured.Rows(arguments.out / "rates.json", about)
    print(f"{about['machine']}: matrix products at {gemm / 1e12:.3g} TFLOP/s; {parameters / 1e6:,.0f}M parameters")
    lines = map(json.loads, Path(arguments.run, "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    for name, steps in itertools.groupby(lines, lambda step: step["stage"]):
        row = of_stage(name, list(steps), settings.model, vocab, gemm)
        rows.add(row)
        (_, first), *_, (_, last) = [row["curve"][0], *row["curve"]]
        last_held_out = row["held_out"][-1].get("validation/loss") if row["held_out"] else None
        said = f", held out {last_held_out:.3f}" if last_held_out is not None else ""
        print(
            f"{name:12}{row['steps']:6} steps{row['tokens']:14,} tokens{row['tokens_per_s']:12,.0f} "
            f"tokens/s{row['share']:8.1%} of the rate; loss {first:.3f} to {last:.3f}{said}"
        )


if __name__ == "__main__":
    command.run(main)
