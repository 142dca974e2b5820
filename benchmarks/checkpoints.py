"""How long does training stand still for a checkpoint? Seconds that a step waits, beside writing it at once and beside
torch's own.

    torchrun --nproc_per_node=2 benchmarks/checkpoints.py [--parameters 200] [--rounds 3] [--tensor_parallel 1]
        [--out runs/benchmarks]

Every rank trains the same model of so many million parameters on a few tokens a step. In every round each form saves
once: "at once" waits until the checkpoint is on the disk; "beside" goes on while a thread writes, as training does;
"torch" is torch.distributed.checkpoint, its `save` and its `async_save`, of the same numbers. Of all ranks the slowest
counts, of the rounds the median. Prints a table; writes checkpoints-<ranks>.json.
"""

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import measured
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from conan_engine.config import Config, Model
from conan_engine.model.transformer import Transformer, count_parameters
from conan_engine.parallel.mesh import Mesh
from conan_engine.parallel.sharded_adamw import ShardedAdamW
from conan_engine.run.saving import Saver

VOCABULARY, TOKENS = 32768, 64


class Words:
    """A tokenizer, as far as a checkpoint knows one."""

    hash = "0" * 32


def trainer(millions, mesh):
    """(optimiser, a function that takes one step, the number of parameters)."""
    config = Model(layers=8, width=1024, ffn=2816, heads=16, kv_heads=4, context=TOKENS)
    config.layers = max(1, round((millions * 1e6 - VOCABULARY * 1024) / (count_parameters(config, 0) / 8)))
    model = Transformer(config, VOCABULARY, "float32", mesh.tensor).init_weights(1).to(mesh.device)
    bfloat16 = mesh.device.type == "cuda" and model.in_bfloat16()
    optimizer = ShardedAdamW(model, mesh, 0.0, torch.bfloat16 if bfloat16 else torch.float32)
    tokens = torch.randint(VOCABULARY, (TOKENS,), dtype=torch.int32, device=mesh.device)
    cu_seqlens = torch.tensor([0, TOKENS], dtype=torch.int32, device=mesh.device)

    def step():
        optimizer.send_next()
        model.next_token_loss(tokens, cu_seqlens, tokens.long().roll(-1)).backward()
        optimizer.reduce_gradients()
        optimizer.step(1e-4, 1e-4)
        optimizer.zero_gradients()

    return optimizer, step, count_parameters(config, VOCABULARY)


class Clock:
    """Seconds of the slowest rank."""

    def __init__(self, mesh):
        self.mesh, self.found = mesh, {}

    def time(self, name, work):
        with self.mesh.together():
            pass
        started = time.perf_counter()
        result = work()
        seconds = max(self.mesh.gather_objects(time.perf_counter() - started))
        self.found.setdefault(name, []).append(seconds)
        return result


def measure(options, mesh):
    optimizer, step, parameters = trainer(options.parameters, mesh)
    folder = Path(mesh.gather_objects(tempfile.mkdtemp(dir=options.on) if mesh.rank == 0 else None)[0])
    config = Config(out_dir=str(folder), keep=1)
    saver, clock = Saver(config, Words, {}, mesh), Clock(mesh)
    number, group = 0, dist.new_group(backend="gloo") if mesh.world > 1 else None

    def start():
        nonlocal number
        number += 1
        saver.start("weak", number, optimizer, {}, {"updates": number})

    def theirs(save, name):
        held = {f"{mesh.rank}/{key}/{name}": values for key, name, _, values in optimizer.held()}
        return save(held, checkpoint_id=folder / name, process_group=group, no_dist=mesh.world == 1)

    def asynchronously(held, no_dist, **options):
        return dcp.async_save(held, **options)

    for _ in range(2):
        step()
    for _ in range(options.rounds):
        clock.time("step", step)
        clock.time("at once", lambda: (start(), saver.finish()))
        clock.time("step", step)
        clock.time("beside", start)
        while saver.work:
            clock.time("step meanwhile", lambda: (step(), saver.poll()))
        clock.time("step", step)
        clock.time("torch, at once", lambda: theirs(dcp.save, "torch"))
        if mesh.world > 1:  # it wants a process group
            clock.time("step", step)
            future = clock.time("torch, beside", lambda: theirs(asynchronously, "torch-beside"))
            while mesh.any(not future.done()):
                clock.time("step meanwhile, torch", step)
            future.result()
        with mesh.together():
            if mesh.rank == 0:
                for written in folder.glob("torch*"):
                    shutil.rmtree(written)
    saver.close()
    if mesh.rank == 0:
        shutil.rmtree(folder)
        report(
            options,
            mesh,
            parameters,
            {name: statistics.median(seconds) for name, seconds in clock.found.items()},
            clock.found,
        )


def report(options, mesh, parameters, median, every):
    print(
        f"{parameters / 1e6:.0f}M parameters, {12 * parameters / 1e9:.1f} GB, {mesh.world} ranks, "
        f"tensor_parallel {mesh.tensor.world}"
    )
    for name, seconds in median.items():
        of = {"beside": "at once", "torch, beside": "torch, at once"}.get(name)
        print(f"  {name:24}{seconds:8.2f} s" + (f"{seconds / median[of]:8.0%} of {of}" if of else ""))
    commit = measured.commit()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"checkpoints-{mesh.world}.json"
    about = {
        "device": str(mesh.device.type),
        "torch": torch.__version__,
        "commit": commit,
        "ranks": mesh.world,
        "tensor_parallel": mesh.tensor.world,
    }
    path.write_text(
        json.dumps({**about, "parameters": parameters, "median_seconds": median, "seconds": every}, indent=1)
    )
    print(f"wrote {path}")


def main():
    parser = measured.Parser(__doc__, quick={"parameters": 10, "rounds": 1})
    parser.add_argument("--parameters", type=float, default=200, metavar="MILLIONS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tensor_parallel", type=int, default=1)
    parser.add_argument("--on", help="the folder to save in (default: a temporary one)")
    options = parser.parse_args()
    mesh = Mesh("auto", options.tensor_parallel)
    measure(options, mesh)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
