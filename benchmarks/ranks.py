"""What of the path for several GPUs can one GPU show?

    python benchmarks/ranks.py [--quick] [--device cuda] [--out runs/benchmarks]

`shared`: train.py in one process, then in two that share the device, as data ranks and as tensor ranks, with gloo
between them (NCCL wants a device for each rank). Losses and gradient norms of every step stand beside those of one
process. `overlap`: train.py in one process whose optimizer sends every bucket to NCCL (gloo on a CPU) with one rank:
how many were sent before the backward pass ended, and on a GPU, from torch.profiler, how long NCCL's stream was busy
and for how much of it kernels of the model ran. With one rank NCCL copies what it would exchange. Prints a line a row
and writes ranks.json; the same command again goes on behind the rows that are there.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time

import measured
import torch
import torch.distributed as dist
import training
from where import marked

from conan_engine import train
from conan_engine.parallel import mesh as meshes
from conan_engine.stages.weak import Weak

CONFIG = """
out_dir = "{out}"
stages = {stages}
precision = "{precision}"
device = "{device}"
save_every = 1000000
log_to = []
[model]
layers = {layers}
width = {width}
ffn = {ffn}
heads = {heads}
kv_heads = 4
context = 256
[tokenizer]
vocab_size = 4096
train_bytes = 2_000_000
[pretrain]
data = {{ docstrings = 1 }}
steps = 6
batch = 8
max_tokens = 256
[weak]
data = {{ docstrings = 1 }}
steps = 6
batch = {batch}
chunk = {chunk}
max_tokens = 128
min_score = 0
dims = [64, 128]
[supervised]
data = {{ docstrings = 1 }}
sts = {{ "docstrings.sts" = 1 }}
steps = 6
batch = 16
sts_batch = 16
max_tokens = 128
dims = [64, 128]
"""
MODELS = {True: {"layers": 2, "width": 128, "ffn": 256, "heads": 8, "batch": 32, "chunk": 16}}
MODELS[False] = {"layers": 8, "width": 1024, "ffn": 4096, "heads": 16, "batch": 256, "chunk": 128}
MOST = 200  # seconds of a start of train.py


def share_the_device(device):
    """This rank computes on the device that all have, and gloo is between them."""
    dist.init_process_group("gloo")
    if device == "cpu":
        torch.set_num_threads(1)
        return
    meshes.choose = lambda setting="auto", index=0: torch.device("cuda", 0)

    def reduce_scatter(out, tensor, group=None, async_op=False):
        """gloo sums CUDA tensors over all ranks, and scatters none."""
        whole = tensor.clone()
        dist.all_reduce(whole, group=group)
        out.copy_(whole.view(dist.get_world_size(group), -1)[dist.get_rank(group)].view_as(out))
        return Done() if async_op else None

    meshes._reduce_scatter = reduce_scatter


class Done:
    """What start_reduce_scatter returns: it is complete."""

    def wait(self):
        return True


def fresh(folder, options):
    """Make a folder for a run, with the first run's shards and tokenizer."""
    first = (options.out / "ranks/1-1-float32/run").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "run").mkdir(parents=True)
    for name in ("data", "tokenizer.model"):
        if (first / name).exists():
            (folder / "run" / name).symlink_to(first / name)


def shared(form, ranks, tensor, precision, options):
    """A row: train.py on so many ranks that share the device."""
    folder = options.out / "ranks" / f"{ranks}-{tensor}-{precision}"
    fresh(folder, options)
    path = folder / "config.toml"
    given = {"stages": ["pretrain", "weak", "supervised"], "precision": precision, "device": options.device}
    path.write_text(CONFIG.format(out=folder / "run", **given, **MODELS[options.quick]), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [__file__, "worker", options.device, str(path), f"--tensor_parallel={tensor}"]
    began = time.perf_counter()
    row = {"form": form, "ranks": ranks, "tensor": tensor, "precision": precision}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MOST)
    except subprocess.TimeoutExpired:
        return row | {"failed": f"not done after {MOST} s"}
    row["took"] = time.perf_counter() - began
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines()
        return row | {"failed": said[0][:300] if said else f"ended with {done.returncode}"}
    lines = (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = ("stage", "step", "loss", "gradient_norm", "seconds")
    return row | {"steps": [{key: step[key] for key in kept} for step in map(json.loads, lines)]}


def beside(row, one):
    """How far a row's steps are from those of one process: the largest relative difference of each kind."""
    found = {}
    for key in ("loss", "gradient_norm"):
        pairs = [(mine[key], theirs[key]) for mine, theirs in zip(row["steps"], one["steps"])]
        found[f"{key}_off"] = max(abs(mine - theirs) / abs(theirs) for mine, theirs in pairs)
    return found


def overlap(options):
    """A row: one process that sends every bucket to itself."""
    folder = options.out / "ranks/overlap"
    fresh(folder, options)
    cuda, path, steps = options.device == "cuda", folder / "config.toml", 6
    given = {"stages": ["weak"], "precision": "auto", "device": options.device}
    path.write_text(CONFIG.format(out=folder / "run", **given, **MODELS[options.quick]), encoding="utf-8")
    device = {"device_id": torch.device("cuda", 0)} if cuda else {}
    dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1, **device)
    sent, ended = [], []

    def send(collective):
        def start(group, flat):
            sent.append(time.perf_counter())
            return collective(torch.empty_like(flat), flat, async_op=True)

        return start

    def backward(plain):
        def run(*arguments):
            del sent[:]
            row = plain(*arguments)
            ended.append(len(sent))
            return row

        return run

    with contextlib.ExitStack() as stack, marked(steps) as found:
        for owner, name, form in [
            (meshes.Group, "start_reduce_scatter", send(meshes._reduce_scatter)),
            (meshes.Group, "start_gather", send(meshes._all_gather)),
            (Weak, "backward", backward(Weak.backward)),
        ]:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, form)
        training.run(path, folder / "run")
    sums = len(sent) // 2  # each bucket is summed, then its new weights are gathered
    row = {"form": f"{'NCCL' if cuda else 'gloo'}, one rank", "buckets": sums, "sent_in_backward": ended[-1]}
    if cuda:
        row |= streams(found[0].events())
        found[0].export_chrome_trace(str(options.out / "overlap-trace.json.gz"))
    return row


def streams(events):
    """Milliseconds of work on the GPU's streams but the busiest, and for how much of it the busiest had work, too."""
    spans = {}
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            spans.setdefault(event.device_resource_id, []).append((event.time_range.start, event.time_range.end))
    main = max(spans, key=lambda stream: sum(end - start for start, end in spans[stream]))
    others = [span for stream, found in spans.items() if stream != main for span in found]
    hidden = sum(max(0, min(end, last) - max(start, first)) for start, end in others for first, last in spans[main])
    return {
        "streams": len(spans),
        "sent_ms": sum(end - start for start, end in others) / 1e3,
        "hidden_ms": hidden / 1e3,
        "computed_ms": sum(end - start for start, end in spans[main]) / 1e3,
    }


def main():
    parser = measured.Parser(__doc__, quick={}, device=True)
    options = parser.parse_args()
    about = {
        "commit": measured.commit(),
        "machine": measured.machine(options.device),
        "versions": measured.versions("torch", "triton"),
        "model": MODELS[options.quick],
    }
    rows = measured.Rows(options.out / "ranks.json", about)
    for precision in ("float32", "bfloat16"):
        for form, ranks, tensor in (("one process", 1, 1), ("2 data ranks", 2, 1), ("2 tensor ranks", 2, 2)):
            before = rows.find(form=form, precision=precision)
            if before and "steps" in before:
                continue
            row = shared(form, ranks, tensor, precision, options)
            one = rows.find(form="one process", precision=precision)
            if one and "steps" in one and "steps" in row:
                row |= beside(row, one)
            rows.add(row)
            said = row.get("failed") or f"{len(row['steps'])} steps"
            if "loss_off" in row:
                said += f", losses within {row['loss_off']:.1g}, norms {row['gradient_norm_off']:.1g}"
            print(f"{form}, {precision}: {said}", flush=True)
    if not any("buckets" in row for row in rows):
        row = overlap(options)
        rows.add(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        _, _, device, *arguments = sys.argv
        if int(os.environ["WORLD_SIZE"]) > 1:
            share_the_device(device)
        sys.argv = ["train.py", *arguments]
        train.main()
    else:
        main()
