"""Training runs small enough for a test, started as processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conan_engine.config import Tokenizer as TokenizerSettings
from conan_engine.data import build
from conan_engine.model.transformer import Transformer
from conan_engine.parallel.mesh import Mesh
from conan_engine.parallel.sharded_adamw import ShardedAdamW
from conan_engine.run.saving import Saver
from conan_engine.settings import load

ROOT = Path(__file__).parent.parent
TINY = """
save_every = 4
precision = "float32"
[model]
layers = 1
width = 32
ffn = 64
heads = 8
kv_heads = 4
head_dim = 16
context = 64
[tokenizer]
vocab_size = 600
[pretrain]
data = {{ "{folder}/text.jsonl" = 1 }}
steps = 6
batch = 8
max_tokens = 48
lr = 1e-2
[sft]
data = {{ "{folder}/instruction.jsonl" = 1 }}
steps = 6
batch = 8
max_tokens = 48
lr = 1e-3
[weak]
data = {{ "{folder}/pairs.jsonl" = 2, "{folder}/instruction.jsonl" = 1 }}
steps = 6
batch = 16
max_tokens = 32
lr = 1e-3
[supervised]
data = {{ "{folder}/pairs.jsonl" = 2, "{folder}/label.jsonl" = 1 }}
sts = {{ "{folder}/sts.jsonl" = 1 }}
steps = 6
batch = 8
sts_batch = 8
max_tokens = 32
lr = 1e-3
dims = [8, 16, 32]
[negatives]
pool = 12
"""


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def small_tokenizer(folder):
    """Of 300 entries, for questions, answers and labels."""
    texts = [{"text": f"question {i} answer {i} another wrong bad good label"} for i in range(400)]
    path = write_lines(folder / "text.jsonl", texts)
    return build.make_tokenizer(
        TokenizerSettings(vocab_size=300, train_bytes=10**6), [(str(path), "pretrain", None)], folder
    )


def shards_of(source, use, stage, tokenizer, folder, max_bad_share=None):
    """Of one source for one use, made by this process."""
    job = build.make_job(str(source), use, stage, tokenizer, folder, max_bad_share)
    return build.make_shards([job], tokenizer, 1)[job.folder]


LINGER = """
import importlib, sys, time
place = sys.argv.pop(1)
module, _, path = place.partition(":")
*within, name = path.split(".")
owner = importlib.import_module(module)
for part in within:
    owner = getattr(owner, part)
called = getattr(owner, name)

def lingering(*arguments, **options):
    print("lingering", flush=True)
    time.sleep(1)
    return called(*arguments, **options)

setattr(owner, name, lingering)
from conan_engine import command, train
command.run(train.main)
"""


def a_gpu_each(ranks):
    """Skip where some ranks, but not all, would have a GPU."""
    if 0 < torch.cuda.device_count() < ranks:
        pytest.skip(f"needs a GPU for each of {ranks} ranks, or none at all")


def start(config, run, *arguments, ranks=1, linger=None):
    """Start a training run as a process of its own, two threads in all. linger: a function ("module:name",
    "module:Class.name") that says "lingering" and takes a second more whenever it is called, for a signal to hit."""
    a_gpu_each(ranks)
    command = [sys.executable] if ranks == 1 else [
        str(Path(sys.executable).parent / "torchrun"), f"--nproc_per_node={ranks}", "--master_port=0",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0", "--signals-to-handle=SIGTERM,SIGUSR1",
    ]  # fmt: skip
    script = [ROOT / "conan_engine" / "train.py"]
    if linger:
        script = [Path(run).parent / "linger.py", linger]
        script[0].write_text(LINGER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *map(str, script), str(config), f"--out_dir={run}", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def train(config, run, *arguments, ranks=1):
    """Run to the end; (exit code, stdout, stderr)."""
    process = start(config, run, *arguments, ranks=ranks)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def one_line(result, *said):
    """A mistake's result, as `train` gives it: exit code 2 and a single line that says these things."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    for text in said:
        assert text in lines[0], lines[0]


def untimed(run):
    """A run's lines of metrics.jsonl, without what depends on how fast it was."""
    times = ("seconds", "waited", "tokens_per_s", "sent_ms", "validation/seconds")
    return [
        {key: value for key, value in row.items() if key not in times}
        for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    ]


def losses(run):
    return [
        (row["stage"], row["step"], row["loss"])
        for row in map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    ]


def untrained(config, run, change=lambda model: None):
    """A run folder as a training run leaves it, its weights still as they were drawn, or as change(model) makes them;
    the tokenizer is trained."""
    settings = load(config, [f"--out_dir={run}"])
    sources = [
        (source, name, about) for name in settings.stages for source, about in getattr(settings, name).data.items()
    ]
    tokenizer = build.make_tokenizer(settings.tokenizer, sources, run)
    model = Transformer(settings.model, tokenizer.vocab_size).init_weights(settings.seed)
    change(model)
    mesh = Mesh("cpu")
    saver = Saver(settings, tokenizer, {}, mesh)
    saver.start("supervised", 0, ShardedAdamW(model, mesh, 0.0), {}, {"updates": 0})
    saver.finish()
    return run
