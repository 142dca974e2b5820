"""What do ranks send each other, and what of it hides behind the computation?

    torchrun --nproc_per_node=8 benchmarks/overlap.py [--tensor_parallel=2] [--recompute=block] [--out runs/benchmarks]
    python benchmarks/overlap.py [--gpu h200] [--out runs/benchmarks]

Under torchrun: train.py trains a small model in two stages, next tokens and pairs, and every collective of at least
4 KB is recorded: its kind, group, bytes and bucket, in order. Beside it stands the schedule that the plan makes
(conan_engine/plan/schedule.py): the order must be the same, and the bytes between data ranks. Other settings are passed
on to train.py. Writes collectives-<ranks>-<tensor ranks>.json, and ends with 1 where they differ.

Without: that schedule, of the 1.4B model on 8, 64 and 1,024 GPUs, is replayed against the speeds of links: how long a
step computes, how long collectives run beside it, and how long it waits for them. Every rank has the same work. Prints
a table; writes overlap-<device>.json. These are predictions.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import measured
import plan

from conan_engine import train
from conan_engine.config import Config
from conan_engine.parallel import mesh as meshes
from conan_engine.parallel import sharded_adamw
from conan_engine.parallel.sharded_adamw import Bucket, ShardedAdamW
from conan_engine.plan import devices, lengths, loads, memory, replay, schedule, timing
from conan_engine.plan.layout import Layout
from conan_engine.plan.report import BETWEEN
from conan_engine.plan.schedule import SMALL, Send
from conan_engine.settings import load

CONFIG = """
out_dir = "{out}"
stages = ["pretrain", "weak"]
device = "cpu"
precision = "float32"
log_to = []
token_vectors = "random"
[model]
layers = 3
width = 64
ffn = 192
heads = 8
kv_heads = 8
context = 128
[tokenizer]
vocab_size = 4096
train_bytes = 500_000
[pretrain]
data = {{ docstrings = 1 }}
steps = 2
batch = 32
chunk = 2
max_tokens = 64
[weak]
data = {{ docstrings = 1 }}
steps = 2
batch = 128
chunk = 16
max_tokens = 16
min_score = 0
"""
VOCABULARY = 4096
BUCKET = 1 << 14  # parameters, so that this model has several


class Recorder:
    """Within it, `steps` gets the Sends of every step of each stage, in order: [[[Send]]]."""

    def __init__(self):
        self.steps, self.events, self.mesh = [], [], None

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        patch = self._patch
        patch(meshes.Mesh, "__init__", lambda made, mesh, *_: setattr(self, "mesh", mesh))
        patch(meshes.Group, "sum", lambda _, group, x: self.add("all-reduce", group, x))
        patch(meshes.Group, "max", lambda _, group, x: self.add("all-reduce", group, x))
        patch(meshes.Group, "gather", lambda out, group, x, counts=None: counts or self.add("all-gather", group, out))
        patch(meshes.Group, "reduce_scatter", lambda _, group, x: self.add("reduce-scatter", group, x))
        patch(Bucket, "publish", lambda _, bucket: self.add("all-gather", bucket.group, bucket.weights, bucket))
        patch(ShardedAdamW, "_send", lambda _, all, of: self.add("reduce-scatter", of.group, of.gradients, of))
        patch(ShardedAdamW, "__init__", lambda _, made, *__: self.number(made.buckets))
        patch(ShardedAdamW, "zero_gradients", lambda *_: self.end())
        return self

    def __exit__(self, *_):
        self.stack.close()

    def _patch(self, owner, name, after):
        plain = getattr(owner, name)

        def recorded(*arguments, **named):
            result = plain(*arguments, **named)
            after(result, *arguments, **named)
            return result

        setattr(owner, name, recorded)
        self.stack.callback(setattr, owner, name, plain)

    def number(self, buckets):
        self.numbers = {id(bucket): number for number, bucket in enumerate(buckets)}
        self.steps.append([])
        self.events = []

    def add(self, kind, group, tensor, bucket=None):
        name = "tensor" if group is self.mesh.tensor else "data" if group is self.mesh.data else "all"
        size = tensor.numel() * tensor.element_size()
        if group.world > 1 and size >= SMALL:
            number = None if bucket is None else self.numbers[id(bucket)]
            self.events.append(Send(kind, name, size, number))

    def end(self):
        if self.steps:
            self.steps[-1].append(self.events)
        self.events = []


def record(options, settings):
    """Train under a Recorder; compare its second steps with the schedule. Returns whether they differ."""
    sharded_adamw.BUCKET = BUCKET
    shared = Path(tempfile.gettempdir(), f"overlap-{os.environ['TORCHELASTIC_RUN_ID']}")
    shared.mkdir(exist_ok=True)
    path = shared / f"config-{os.environ['RANK']}.toml"
    path.write_text(CONFIG.format(out=shared / "run"))
    sys.argv = ["train.py", str(path), *settings]
    with Recorder() as recorder:
        train.main()
    mesh = recorder.mesh
    if mesh.rank:
        return False
    config, stages, differ = load(path, settings), {}, False
    form = memory.Form("cpu", False, config.recompute == "block", mesh.data.world, mesh.tensor.world)
    texts, _ = lengths.of(config)
    for name, steps in zip(config.stages, recorder.steps):
        layout, work = Layout(config, name, VOCABULARY, form.tensor), loads.of(name, config, form.data, texts)
        events = schedule.step(layout, work, form, timing.Times(0, 0, 0, 0, 0, 0))
        planned, found = [one for one in events if isinstance(one, Send)], steps[1]
        row = {
            "collectives": len(found),
            "same_order": [one._replace(size=0) for one in found] == [one._replace(size=0) for one in planned],
            "same_bytes_of_data": sizes_of("data", found) == sizes_of("data", planned),
            # texts have any length: the plan knows their mean
            "planned_bytes_of_tensor": sum(sizes_of("tensor", planned)),
            "bytes_of_tensor": sum(sizes_of("tensor", found)),
        }
        far = abs(row["planned_bytes_of_tensor"] - row["bytes_of_tensor"]) > 0.15 * row["bytes_of_tensor"]
        differ = differ or far or not (row["same_order"] and row["same_bytes_of_data"])
        stages[name] = row | {"sends": found}
        print(name, json.dumps(row), flush=True)
    about = {"commit": measured.commit(), "settings": settings, "ranks": mesh.world, "tensor_ranks": form.tensor}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"collectives-{mesh.world}-{form.tensor}{'-recompute' if form.recompute else ''}.json"
    path.write_text(json.dumps({**about, "stages": stages}))
    shutil.rmtree(shared, ignore_errors=True)
    return differ


def sizes_of(group, sends):
    return [one.size for one in sends if one.group == group]


def replayed(device, links):
    """Rows of the 1.4B model: the steps of step.py on each data rank, on meshes of GPUs."""
    config = Config()
    for work in ("text", "pairs"):
        name, load_of_rank = plan.of_step(work, config)
        for gpus in (8, 64, 1024):
            for tensor in (1, 2, 8):
                form = memory.Form("cuda", True, False, gpus // tensor, tensor)
                layout = Layout(config, name, config.tokenizer.vocab_size, tensor)
                times = timing.of(layout, load_of_rank, form, device)
                found = replay.of(schedule.step(layout, load_of_rank, form, times), form, links)
                yield {
                    "work": work, "gpus": gpus, "data": form.data, "tensor": tensor,
                    "bytes": sum(memory.of(layout, load_of_rank, form).values()),
                    "tokens_per_s_of_gpu": load_of_rank.tokens / tensor / found.step, **found._asdict(),
                }  # fmt: skip


def main():
    parser = measured.Parser(__doc__, quick=None)
    parser.add_argument("--gpu", default="h200", help="default: %(default)s")
    options, settings = parser.parse_known_args()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SystemExit(record(options, settings))
    device = devices.named(options.gpu)
    links = replay.Links(device.link, BETWEEN, 8)
    about = {"device": device.name, "links": links, "commit": measured.commit()}
    rows = measured.Rows(options.out / f"overlap-{device.name.lower()}.json", about)
    print(
        f"{'work':6}{'GPUs':>6}{'data x tensor':>15}{'step ms':>9}{'computes':>10}{'data sends':>11}{'hidden':>8}",
        end="",
    )
    print(f"{'waits data':>12}{'tensor':>8}{'tokens/s of a GPU':>19}")
    for row in replayed(device, links):
        hidden = 1 - row["waits_data"] / row["sends_data"] if row["sends_data"] else 1
        print(
            f"{row['work']:6}{row['gpus']:6}{row['data']:>9} x {row['tensor']:<3}{1e3 * row['step']:9.0f}"
            f"{1e3 * row['computes']:10.0f}{1e3 * row['sends_data']:11.0f}{hidden:8.0%}{1e3 * row['waits_data']:12.0f}"
            f"{1e3 * row['waits_tensor']:8.0f}{row['tokens_per_s_of_gpu']:19,.0f}"
        )
        rows.add(row)


if __name__ == "__main__":
    main()
