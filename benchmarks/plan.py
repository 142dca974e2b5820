"""How near is the plan? What `--plan_only` predicts, beside what was measured.

    python benchmarks/plan.py [--quick] [--sizes small middle large] [--step benchmarks/results/step-h200.json ...]
        [--out runs/benchmarks]

Memory on this machine's CPU: train.py trains each size for a few steps, next tokens (`pretrain`) and pairs (`weak`),
with a checkpoint after each; the process' peak resident memory stands beside the plan's. Steps on a GPU: time and
memory of what step.py measured (--step), beside the plan's; memory of its first row alone, since what an earlier one
leaves would count. The paper's four stages on H100: predicted hours beside the paper's. Prints a table; writes
plan.json.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import measured
from step import Work

from conan_engine.config import Config
from conan_engine.plan import devices, lengths, memory, predicting, replay, schedule, timing
from conan_engine.plan.layout import Layout
from conan_engine.plan.loads import Load
from conan_engine.settings import load

ROOT = Path(__file__).resolve().parent.parent
SIZES = {  # layers, width, FFN width, heads
    "tiny": (2, 128, 256, 2),
    "small": (4, 256, 1024, 4),
    "middle": (8, 512, 1536, 8),
    "large": (8, 1024, 3072, 16),
}
CONFIG = """
out_dir = "{out}"
stages = ["{stage}"]
precision = "float32"
log_to = []
save_every = 1
token_vectors = "random"
[model]
layers = {layers}
width = {width}
ffn = {ffn}
heads = {heads}
kv_heads = {heads}
context = 512
[tokenizer]
vocab_size = 16384
train_bytes = 2_000_000
[pretrain]
data = {{ docstrings = 1 }}
steps = 5
batch = 8
max_tokens = 512
[weak]
data = {{ docstrings = 1 }}
steps = 5
batch = 64
max_tokens = 128
min_score = 0
"""
# The paper's stages (arXiv 2509.12892): GPUs, hours, and settings that have as many tokens. It gives no lengths, and no
# GPUs for stages 3 and 4: documents of 1,000 tokens, records of 300, pairs of 150 + 150, and 16 GPUs are assumed.
PAPER = {
    "pretrain": (64, 219, ["--pretrain.steps=360000"], 1000),  # 3.0T tokens
    "sft": (16, 38, ["--sft.batch=64", "--sft.steps=85800"], 300),  # 600M records
    "weak": (16, 97, ["--weak.batch=1024", "--weak.steps=1728500"], 150),  # 1.77B pairs, 64 a GPU
    "supervised": (16, 13, ["--supervised.batch=64", "--supervised.sts_batch=512", "--supervised.steps=137500"], 150),
}


def on_cpu(size, stage, folder):
    """A row: planned and measured bytes of train.py at this size."""
    layers, width, ffn, heads = SIZES[size]
    config = Path(folder, f"{size}-{stage}.toml")
    out = Path(folder, "run")
    config.write_text(CONFIG.format(out=out, stage=stage, layers=layers, width=width, ffn=ffn, heads=heads))
    _done([sys.executable, "-m", "conan_engine.prepare", config])
    said = _done([sys.executable, ROOT / "conan_engine/train.py", config, "--plan_only=true"])
    kinds = {
        kind: float(gib) * 2**30
        for kind, gib in re.findall(r"([a-z ]+) ([\d.]+)(?:,|$)", said.split("GiB: ")[1].splitlines()[0])
    }
    process = subprocess.Popen(
        [sys.executable, ROOT / "conan_engine/train.py", config], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, f"{config}: ended with {status}"
    for checkpoint in out.glob("checkpoints"):
        checkpoint.rename(Path(folder, f"{size}-{stage}-checkpoints"))
    return {"form": f"CPU, {size}", "work": stage, "planned": kinds, "peak_bytes": 1024 * used.ru_maxrss}


def _done(command):
    ended = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert not ended.returncode, ended.stderr[-2000:]
    return ended.stdout


def of_step(name, config):
    """The stage and the Load of a step of step.py, "text" or "pairs"."""
    work = Work(name, config.model, config.tokenizer.vocab_size, 1)
    squares, half = sum(n * n for n in work.lengths), 0 if work.causal else len(work.lengths) // 2
    return "pretrain" if work.causal else "weak", Load(
        tokens=work.tokens, texts=len(work.lengths), pairs=(squares + work.tokens) / 2 if work.causal else squares,
        learnt=work.tokens if work.causal else 0, at_once=work.tokens, parts=1, both_ways=not work.causal,
        queries=half, documents=half, dims=len(config.supervised.dims),
    )  # fmt: skip


def on_gpu(path):
    """Rows: planned and measured seconds and bytes of our form's steps in a step.json of the 1.4B model."""
    report, config = json.loads(Path(path).read_text(encoding="utf-8")), Config()
    name = report["machine"].removeprefix("NVIDIA ")
    machines = predicting.Machines(devices.named(name.split(" ")[0]), 1, replay.Links(450, 50, 8))
    form = memory.Form("cuda", True)
    for row in report["rows"]:
        if row["form"] != "ours" or "seconds" not in row:
            continue
        stage, load = of_step(row["work"], config)
        layout = Layout(config, stage, config.tokenizer.vocab_size)
        times = timing.of(layout, load, form, machines.device)
        planned = memory.of(layout, load, form)
        seconds = replay.of(schedule.step(layout, load, form, times), form, machines.links).step
        yield {
            "form": f"{name}, 1.4B", "work": row["work"], "planned": planned,
            "peak_bytes": row["peak_bytes"] if row is report["rows"][0] else None,
            "planned_seconds": seconds, "seconds": row["seconds"], "file": Path(path).name,
        }  # fmt: skip


def of_the_paper():
    """Rows: the paper's hours of each stage, and the plan's on H100s, on the fastest mesh that fits."""
    for name, (gpus, hours, settings, tokens) in PAPER.items():
        given = [f"--stages=['{name}']", f"--plan.tokens=[{tokens}]", "--device=cpu", *settings]
        config = load("conan-1.4b", given)
        planner = predicting.Planner(config, config.tokenizer.vocab_size, lengths.of(config)[0])
        machines = predicting.Machines(devices.named("h100"), gpus, replay.Links(450, 50, 8))
        (stage,) = planner.fitting(machines)[0]
        yield {
            "form": "the paper's", "work": name, "gpus": gpus, "settings": given, "paper_hours": hours,
            "planned_hours": stage.seconds / 3600, "data": stage.form.data, "tensor": stage.form.tensor,
            "recompute": stage.form.recompute, "chunk": stage.cut.chunk, "planned_seconds": stage.time.step,
            "mfu": stage.mfu(machines), "tokens": stage.load.tokens * stage.form.data * stage.steps,
        }  # fmt: skip


def main():
    parser = measured.Parser(__doc__, quick={"sizes": ["tiny"]})
    parser.add_argument("--sizes", nargs="*", default=["small", "middle", "large"], choices=SIZES)
    parser.add_argument("--step", nargs="*", default=[ROOT / "benchmarks/results/step-h200.json"], metavar="FILE")
    options = parser.parse_args()
    about = {"machine": measured.machine("cpu"), "commit": measured.commit(), "versions": measured.versions("torch")}
    rows = measured.Rows(options.out / "plan.json", about)
    print(f"{'':22}{'work':>9}" + 2 * f"{'planned':>13}{'measured':>10}{'ratio':>7}" + "  (GiB; ms)")

    def show(row):
        if "paper_hours" in row:
            hours = f"{row['planned_hours']:.0f} h planned, {row['paper_hours']} h in the paper"
            print(f"{row['form']:22}{row['work']:>11}  {hours} on {row['gpus']} GPUs; MFU {row['mfu']:.0%}")
            rows.add(row)
            return
        planned, peak = sum(row["planned"].values()), row["peak_bytes"]
        line = f"{row['form']:22}{row['work']:>9}{planned / 2**30:13.2f}"
        line += f"{peak / 2**30:10.2f}{planned / peak:7.2f}" if peak else f"{'-':>10}{'-':>7}"
        if "seconds" in row:
            line += f"{1e3 * row['planned_seconds']:13.1f}{1e3 * row['seconds']:10.1f}"
            line += f"{row['planned_seconds'] / row['seconds']:7.2f}"
        print(line, flush=True)
        rows.add(row)

    for path in options.step:
        for row in on_gpu(path):
            show(row)
    for row in of_the_paper():
        show(row)
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            for stage in ("pretrain", "weak"):
                show(on_cpu(size, stage, folder))


if __name__ == "__main__":
    main()
