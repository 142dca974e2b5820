"""What does each stage bring? A run's model as it starts and after each of its stages, by the tasks of
`conan_engine.evaluate`; and the last without what its attention, or whole blocks, add to the tokens' own vectors; and
with all that the weak stage learnt, where weak.blend keeps a share of it.

    python benchmarks/stages.py RUN [--tasks FILE] [--out runs/benchmarks]

RUN keeps every stage's last checkpoint; how it starts is drawn again from its seed, or taken from init_from, then also
causal, as it came. Prints a table and writes stages.json: one row a stage, with its seconds and tokens; the same
command again goes on behind the rows that are there. --tasks: a file of gpu/pack.py, where the packages with the texts
are not installed.
"""

import dataclasses
import json
from pathlib import Path

import measured
import torch

from conan_engine import command
from conan_engine.data import datasets
from conan_engine.errors import UserError
from conan_engine.evaluation import tasks
from conan_engine.evaluation.encoder import Encoder
from conan_engine.evaluation.scores import NAMES
from conan_engine.parallel.mesh import Mesh
from conan_engine.run import checkpoint, models
from conan_engine.settings import from_dict

# row: what it silences of the last stage's model
SILENT = {"no attention": ["attention_out"], "no blocks": ["attention_out", "ffn_out"]}


def at_start(settings, mesh):
    tokenizer, shards, _ = datasets.prepare(settings)
    model, _ = models.make(settings, tokenizer, shards, mesh, None, ["weak"])
    return Encoder(model, tokenizer, settings.model.context, settings.supervised.dims)


@torch.no_grad()
def silence(model, parts):
    """These parts of each block add nothing any more."""
    for block in model.blocks:
        for part in parts:
            getattr(block, part).weight.zero_()


@torch.no_grad()
def unblend(encoder, run, settings, mesh):
    """What the weak stage changed, back to its whole size."""
    before = settings.stages[: settings.stages.index("weak")]
    began = (
        checkpoint.load_model(checkpoint.of_stage(run, before[-1])[0])[0] if before else at_start(settings, mesh).model
    )
    ended = checkpoint.load_model(checkpoint.of_stage(run, "weak")[0])[0]
    for weight, old, new in zip(encoder.model.parameters(), began.parameters(), ended.parameters()):
        weight.add_(new - old, alpha=1 / settings.weak.blend - 1)


def main():
    parser = measured.Parser(__doc__)
    parser.add_argument("run", help="a run folder, such as runs/demo")
    parser.add_argument("--tasks", metavar="FILE")
    arguments = parser.parse_args()
    found = checkpoint.newest(arguments.run)
    if not found:
        raise UserError(
            f"{arguments.run}: no whole checkpoint; train one with torchrun conan_engine/train.py "
            f"--out_dir={arguments.run}"
        )
    settings = from_dict(found[1]["config"], arguments.run)
    # it may have been moved, and trained by several ranks
    settings, mesh = dataclasses.replace(settings, out_dir=arguments.run, tensor_parallel=1), Mesh(settings.device)
    steps = [json.loads(line) for line in Path(arguments.run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    given = tasks.load(arguments.tasks)
    about = {"commit": measured.commit(), "machine": measured.machine(mesh.device.type), "run": arguments.run}
    rows = measured.Rows(arguments.out / "stages.json", about)
    last, whole = settings.stages[-1], ["no blend"] if "weak" in settings.stages and settings.weak.blend < 1 else []
    causal = ["start, causal"] if settings.init_from else []
    for stage in ("start", *causal, *settings.stages, *SILENT, *whole):
        if rows.find(stage=stage):
            continue
        if stage.startswith("start"):
            encoder = at_start(settings, mesh)
            encoder.alpha = 0.0 if stage in causal else 1.0
        else:
            encoder = Encoder.load(checkpoint.of_stage(arguments.run, stage if stage in settings.stages else last)[0])
            silence(encoder.model, SILENT.get(stage, ()))
            if stage in whole:
                unblend(encoder, arguments.run, settings, mesh)
        encoder.model.precision = found[1]["precision"]  # as trained: float32 takes longer on some CPUs
        mine = [step for step in steps if step["stage"] == stage]
        row = {
            "stage": stage,
            "steps": len(mine),
            "seconds": sum(step["seconds"] for step in mine),
            "tokens": sum(step["tokens"] for step in mine),
        }
        rows.add(row | tasks.measure(tasks.Embedded(encoder.encode, given), given, encoder.dims))
    print(f"{'after':28}" + "".join(f"{row['stage']:>14}" for row in rows))
    for key, name in {**NAMES, "steps": "steps", "seconds": "seconds", "tokens": "tokens"}.items():
        print(f"{name:28}" + "".join(f"{row[key]:14.3f}" if key in NAMES else f"{row[key]:14,.0f}" for row in rows))


if __name__ == "__main__":
    command.run(main)
