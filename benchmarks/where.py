"""Where does the time of a training step go? By part of the model, forward and backward, beside the machine's rate of
matrix products.

    python benchmarks/where.py CONFIG [--section.key=value ...] [--steps 8] [--out runs/benchmarks]

Trains the first stage of CONFIG for so many steps, as train.py does it, and records the last with torch.profiler: the
device's time on a GPU, else the processor's. Each operation belongs to the part of the model that asked for it, and its
backward pass to the same. Prints a table and writes where.json. `rate` is that of a large square matrix product, on a
CPU the faster one of oneDNN's and MKL's. `share` is what the step's matrix products, forward, backward and again for
gradient caching, would take of the median step at that rate. Attention's own products are not counted.
"""

import collections
import contextlib
import json
import math
import shutil
import statistics

import measured
import torch
import training
from step import seconds_of
from torch.profiler import ProfilerActivity, profile, record_function

from conan_engine import command
from conan_engine.model import attention, losses, transformer
from conan_engine.parallel import cpu_linear, sharded_adamw
from conan_engine.parallel.device import choose
from conan_engine.run import checkpoint
from conan_engine.run.pace import Pace
from conan_engine.settings import load

MARK, WAYS = "part: ", ("forward", "backward")
PARTS = [  # what of which module is what part of a step
    (cpu_linear.Linear, "forward", "products"),
    (attention.Attention, "__init__", "attention"),
    (attention.Attention, "__call__", "attention"),
    (transformer, "rotate", "RoPE"),
    (transformer, "add_rms_norm", "norms and residual"),
    (transformer, "swiglu", "SwiGLU"),
    (transformer, "linear_cross_entropy", "LM head"),
    (losses, "info_nce", "InfoNCE"),
    (sharded_adamw.ShardedAdamW, "reduce_gradients", "optimizer"),
    (sharded_adamw.ShardedAdamW, "step", "optimizer"),
    (sharded_adamw.ShardedAdamW, "zero_gradients", "optimizer"),
    (transformer.Transformer, "forward", "rest of the model"),
    (transformer.Transformer, "embed", "rest of the model"),
]
SUMS = ("AccumulateGrad", "adding up gradients")
PRODUCTS = {"mkldnn::_linear_pointwise": (0, 1), "aten::mm": (0, 1), "aten::addmm": (1, 2)}  # where the factors are


@contextlib.contextmanager
def marked(steps):
    """Within it, the parts leave their names in a profile, and the profile of step number `steps` is yielded[0]."""
    found, count = [], 0

    def begins(plain):
        def begin(pace):
            nonlocal count
            count += 1
            if count == steps:
                cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
                found.append(profile(activities=[ProfilerActivity.CPU, *cuda], record_shapes=True))
                found[0].start()
            plain(pace)

        return begin

    def ends(plain):
        def end(pace, row):
            done = plain(pace, row)
            if count == steps:
                found[0].stop()
            return done

        return end

    def part(name):
        def named(plain):
            def marked(*arguments, **options):
                with record_function(MARK + name):
                    return plain(*arguments, **options)

            return marked

        return named

    changes = [(Pace, "begin", begins), (Pace, "end", ends), *((owner, at, part(name)) for owner, at, name in PARTS)]
    with contextlib.ExitStack() as stack:
        for owner, at, change in changes:
            stack.callback(setattr, owner, at, getattr(owner, at))
            setattr(owner, at, change(getattr(owner, at)))
        yield found


def ancestors(event):
    """The event and what it is within, innermost first."""
    while event is not None:
        yield event
        event = event.cpu_parent


def part_of(event, of_node):
    """(part, "forward" or "backward") of an event. of_node: {number of a graph's node: its part}."""
    for one in ancestors(event):
        if one.name.startswith(MARK):
            return one.name.removeprefix(MARK), "forward"
        if one.name.startswith("autograd::engine::evaluate_function"):
            if SUMS[0] in one.name:
                return SUMS[1], "backward"
            return of_node.get(one.sequence_nr, "rest of the model"), "backward"
    return "rest of the step", "forward"


def read(events, cuda):
    """({(part, way): seconds}, FLOP of the matrix products, their seconds). An operation's seconds are its own."""
    of_node, seconds, flop, multiplied = {}, collections.Counter(), 0, 0.0
    events = [
        event for event in events if event.device_type == torch.autograd.DeviceType.CPU
    ]  # they know their kernels
    for event in events:
        if event.sequence_nr >= 0 and event.scope == 0:  # scope 0: of the forward pass
            own = next((one for one in ancestors(event) if one.name.startswith(MARK)), None)
            if own:
                of_node.setdefault(event.sequence_nr, own.name.removeprefix(MARK))
    for event in events:
        took = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        where = part_of(event, of_node)
        seconds[where] += took
        if event.name in PRODUCTS and where[0] == "products":
            (*rows, inner), other = (event.input_shapes[i] for i in PRODUCTS[event.name])
            flop += 2 * math.prod(rows) * inner * (math.prod(other) // inner)
            multiplied += took
    return seconds, flop, multiplied


def rate(device, bfloat16):
    """FLOP/s of a large square product, of the fastest way to it."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32) for _ in range(2))
    ways = [lambda: a @ b]
    if device.type == "cpu" and not bfloat16 and cpu_linear.available():
        ways.append(lambda: cpu_linear.product(a, b))
    return 2 * n**3 / min(seconds_of(way, device, 0.5) for way in ways)


def main():
    parser = measured.Parser(__doc__, quick={"steps": 3})
    parser.add_argument("config")
    parser.add_argument("--steps", type=int, default=8)
    options, settings = parser.parse_known_args()
    config = load(options.config, settings)
    device, stage = choose(config.device), config.stages[0]
    folder = options.out / "where"
    shutil.rmtree(folder, ignore_errors=True)
    given = [*settings, f"--stages=['{stage}']", f"--{stage}.steps={options.steps}", "--validation.data={}"]
    with marked(options.steps) as found:
        training.run(options.config, folder, *given, "--save_every=1000000")
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    plain = steps[len(steps) // 4 : -1]  # the last was recorded, which takes time
    median, tokens = (statistics.median(step[key] for step in plain) for key in ("seconds", "tokens"))
    seconds, flop, multiplied = read(found[0].events(), device.type == "cuda")
    precision = checkpoint.newest(folder)[1]["precision"]
    fastest = rate(device, precision == "bfloat16")
    share = flop / (steps[-1]["tokens"] / tokens * median * fastest)
    report = {
        "commit": measured.commit(),
        "machine": measured.machine(device.type),
        "versions": measured.versions("torch", "triton"),
        "config": options.config,
        "settings": settings,
        "precision": precision,
        "tokens": tokens,
        "seconds": median,
        "rate": fastest,
        "share": share,
        "products_rate": flop / multiplied,
        "recorded": {"tokens": steps[-1]["tokens"], "seconds": steps[-1]["seconds"], "flop": flop},
        "rows": [
            {"part": part, **{way: seconds[part, way] for way in WAYS}}
            for part in sorted({part for part, _ in seconds}, key=lambda one: -sum(seconds[one, way] for way in WAYS))
        ],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "where.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(
        f"{report['machine']}, {precision}: {tokens:,.0f} tokens in {median:.2f} s, {tokens / median:,.0f} tokens/s; "
        f"matrix products at {fastest / 1e12:.3g} TFLOP/s, in the step at {report['products_rate'] / 1e12:.3g}: "
        f"{share:.0%} of the step"
    )
    print(f"{'':24}{'forward':>12}{'backward':>12}{'share':>8}")
    whole = sum(seconds.values())
    for row in report["rows"]:
        both = sum(row[way] for way in WAYS)
        print(f"{row['part']:24}" + "".join(f"{1e3 * row[way]:9,.0f} ms" for way in WAYS) + f"{both / whole:8.1%}")


if __name__ == "__main__":
    command.run(main)
