"""Does the memory of a step depend on how long its texts are? Peak memory and time of steps with gradient caching, cut
by texts (`chunk`) and by tokens (`chunk_tokens`).

    python benchmarks/lengths.py [--quick] [--tokens 16384] [--chunk 32] [--chunk_tokens 4096] [--alpha 0.5]
        [--layers 4] [--width 512] [--device cpu] [--out runs/benchmarks]

A batch has so many tokens: texts of one length, or of lengths that a log-normal distribution gives. Each row is a
process of its own that takes three steps; its peak memory stands beside the plan's. Prints a table; writes
lengths.json.
"""

import itertools
import multiprocessing
import resource
import time

import measured
import torch

from conan_engine.config import Config, Model, Stage
from conan_engine.model.transformer import Transformer
from conan_engine.parallel.mesh import Mesh
from conan_engine.parallel.sharded_adamw import ShardedAdamW
from conan_engine.plan import memory
from conan_engine.plan.layout import Layout
from conan_engine.plan.loads import Load
from conan_engine.stages.contrastive import embed_and_backward
from conan_engine.stages.packed import Packed

VOCABULARY, STEPS = 32_768, 3


def lengths_of(kind, tokens):
    """The lengths of a batch's texts."""
    if kind != "log-normal":
        return [int(kind)] * (tokens // int(kind))
    drawn = (torch.randn(tokens, generator=torch.Generator().manual_seed(1)) * 1.2 + 4.6).exp()
    drawn = drawn.clamp(4, tokens // 4).int().tolist()
    count = sum(total <= tokens for total in itertools.accumulate(drawn))
    return [*drawn[:count], tokens - sum(drawn[:count])]


def row(kind, key, options):
    """Measure one batch, cut one way. Runs in a process of its own."""
    mesh, width, cuda = Mesh(options.device), options.width, options.device == "cuda"
    config = Config(stages=["weak"])
    config.model = Model(layers=options.layers, width=width, ffn=3 * width, heads=8, kv_heads=8, context=options.tokens)
    model = Transformer(config.model, VOCABULARY, "bfloat16" if cuda else "float32").init_weights(1).to(mesh.device)
    optimizer = ShardedAdamW(model, mesh, 0.0, torch.bfloat16 if cuda else torch.float32)
    lengths, settings = lengths_of(kind, options.tokens), Stage(**{key: getattr(options, key)})
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    tokens = torch.randint(VOCABULARY, (options.tokens,), dtype=torch.int32)
    batch = Packed(tokens.to(mesh.device), cu_seqlens.to(mesh.device))
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        embed_and_backward(
            model, batch, settings, options.alpha, "column", lambda x: ((x @ x.T).mean(),), optimizer.send_next
        )
        optimizer.reduce_gradients()
        optimizer.step(1e-4, 1.0)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    parts, _ = batch.cut(settings)
    load = Load(options.tokens, len(lengths), 0, 0, max(len(part.tokens) for part in parts), len(parts))
    planned = memory.of(Layout(config, "weak", VOCABULARY, 1), load, memory.Form(options.device, cuda))
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "texts": kind, "count": len(lengths), "longest": max(lengths), "cut": key, "parts": len(parts),
        "peak_bytes": peak, "planned_bytes": sum(planned.values()) - planned.get("checkpoint", 0),
        "seconds": min(seconds),
    }  # fmt: skip


def main():
    quick = {"tokens": 2048, "chunk_tokens": 512, "layers": 1, "width": 128}
    parser = measured.Parser(__doc__, quick=quick, device=True)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--chunk_tokens", type=int, default=4096)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    about = {"commit": measured.commit(), "machine": measured.machine(options.device)}
    about |= {key: getattr(options, key) for key in ("tokens", "chunk", "chunk_tokens", "alpha", "layers", "width")}
    rows = measured.Rows(options.out / "lengths.json", about)
    kinds = [*map(str, (16, 128, options.chunk_tokens // 4, options.chunk_tokens)), "log-normal"]
    for kind, key in itertools.product(kinds, ("chunk", "chunk_tokens")):
        with multiprocessing.get_context("spawn").Pool(1) as process:
            one = process.apply(row, (kind, key, options))
        rows.add(one)
        measured_gib, planned_gib = (one[key] / 2**30 for key in ("peak_bytes", "planned_bytes"))
        print(
            f"{one['count']:5} texts of {kind:>10} tokens, {key:12} {one['parts']:4} parts {measured_gib:6.2f} GiB "
            f"(planned {planned_gib:.2f}) {one['seconds']:7.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
