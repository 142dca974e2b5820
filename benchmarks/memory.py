"""How long a text fits? Peak memory of a rank, and time, of a training step on one text of T tokens, by length.

    torchrun --nproc_per_node=2 benchmarks/memory.py [--tensor_parallel 2] [--lengths 4096 8192 16384 32768]
        [--config configs/demo.toml] [--layers 8] [--alpha 0] [--out runs/benchmarks]

The model is the config's, with so many layers; the step is the next token's loss at alpha 0, else an embedding's
length, forward and backward, with and without recompute = "block". Memory is the peak beyond what the rank holds before
the step (weights, gradients, optimiser), of the rank that needs most. Prints a table; writes memory-<tensor
ranks>.json.
"""

import ctypes
import gc
import json
import time
from pathlib import Path

import measured
import torch

from conan_engine.model.transformer import Transformer
from conan_engine.parallel.mesh import Mesh
from conan_engine.parallel.sharded_adamw import ShardedAdamW
from conan_engine.settings import load


def status(name):
    return 1024 * int(next(x for x in open("/proc/self/status") if x.startswith(name)).split()[1])


def peak(run, mesh):
    """(bytes, seconds) of the rank that needs most."""
    gc.collect()
    cuda = mesh.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system, or its reuse would not count
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
        before = status("VmRSS")
    with mesh.together():
        pass
    started = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    most = torch.cuda.max_memory_allocated() if cuda else status("VmHWM")
    return tuple(map(max, zip(*mesh.gather_objects((most - before, seconds)))))


def main():
    parser = measured.Parser(__doc__, quick={"lengths": [256, 512], "layers": 1})
    parser.add_argument("--tensor_parallel", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768], metavar="T")
    parser.add_argument("--config", default="configs/demo.toml")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=0.0)
    options = parser.parse_args()
    config = load(options.config, [f"--model.layers={options.layers}", f"--tensor_parallel={options.tensor_parallel}"])
    mesh = Mesh(config.device, config.tensor_parallel)
    vocab = config.tokenizer.vocab_size
    model = Transformer(config.model, vocab, config.precision, mesh.tensor).init_weights(1).to(mesh.device)
    bfloat16 = mesh.device.type == "cuda" and model.in_bfloat16()
    optimizer = ShardedAdamW(model, mesh, 0.0, torch.bfloat16 if bfloat16 else torch.float32)
    rows = []
    for T in options.lengths:
        tokens = torch.randint(vocab, (T,), dtype=torch.int32, generator=torch.Generator().manual_seed(1)).to(
            mesh.device
        )
        cu_seqlens = torch.tensor([0, T], dtype=torch.int32, device=mesh.device)

        def run():
            if options.alpha:
                model.embed(tokens, cu_seqlens, options.alpha).square().sum().backward()
            else:
                (model.next_token_loss(tokens, cu_seqlens, tokens.long().roll(-1)) / T).backward()

        for model.recompute in ("none", "block"):
            used, seconds = peak(run, mesh)
            optimizer.zero_gradients()
            rows.append({"T": T, "recompute": model.recompute, "peak_bytes": used, "seconds": seconds})
            if mesh.rank == 0:
                print(
                    f"T = {T:6,}  {mesh.tensor.world} tensor ranks  recompute "
                    f"{model.recompute:6}{used / 2**30:8.2f} GiB{seconds:9.1f} s",
                    flush=True,
                )
    if mesh.rank == 0:
        commit = measured.commit()
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"memory-{mesh.tensor.world}.json"
        about = {
            "device": mesh.device.type,
            "torch": torch.__version__,
            "commit": commit,
            "tensor_ranks": mesh.tensor.world,
            "layers": options.layers,
            "width": config.model.width,
            "alpha": options.alpha,
        }
        path.write_text(json.dumps({**about, "rows": rows}, indent=1))
        print(f"wrote {path}")
    mesh.close()


if __name__ == "__main__":
    main()
