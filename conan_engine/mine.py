"""Mine the hard negatives of a run ahead of time.

    python -m conan_engine.mine CONFIG [--KEY=VALUE ...]
    torchrun --nproc_per_node=N -m conan_engine.mine CONFIG [--KEY=VALUE ...]

CONFIG and settings are those of train.py, which otherwise mines when the
supervised stage begins. The model is the run's after the stage before, or that
of init_from if supervised is the first stage. Stopped or killed, the same
command continues behind the blocks that are finished.

Example:
    torchrun --nproc_per_node=8 -m conan_engine.mine run.toml \\
        --negatives.dim=256
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from conan_engine import command, stages
from conan_engine.data import datasets
from conan_engine.errors import UserError
from conan_engine.negatives import mining
from conan_engine.parallel import precision
from conan_engine.parallel.mesh import Mesh
from conan_engine.run import checkpoint, lock, models
from conan_engine.run.interrupts import Interrupts
from conan_engine.settings import load


def main() -> None:
    if command.answered(__doc__):
        return
    if len(sys.argv) < 2:
        raise UserError("CONFIG is missing; name the TOML file of the run whose hard negatives are to be mined")
    interrupts = Interrupts()
    config = load(sys.argv[1], sys.argv[2:])
    if "supervised" not in config.stages:
        raise UserError(f"{sys.argv[1]}: stages has no supervised, the only stage with mined negatives; add it")
    mesh = Mesh(config.device, config.tensor_parallel, config.timeout)
    with mesh.together():
        held = lock.hold(config.out_dir) if mesh.rank == 0 else None
    found = checkpoint.newest(Path(config.out_dir), config.stages, mesh)
    before = config.stages[: config.stages.index("supervised")]
    if found and found[1]["stage"] == "supervised":
        raise UserError(
            f"{found[0]}: the supervised stage has begun, with the negatives mined for it; there is nothing to mine"
        )
    if before and (
        not found or (found[1]["stage"], found[1]["step"]) != (before[-1], getattr(config, before[-1]).steps)
    ):
        where = f"step {found[1]['step']} of {found[1]['stage']}" if found else "no checkpoint yet"
        raise UserError(
            f"{config.out_dir}: the run is at {where}; mining needs the model after step "
            f"{getattr(config, before[-1]).steps} of {before[-1]}: train that first (--stages={before})"
        )
    interrupts.doing = "preparing data"
    with mesh.together():
        if mesh.rank == 0:
            datasets.prepare(config)
    tokenizer, shards, _ = datasets.prepare(config)
    products, _ = precision.choose(config, mesh, found and found[1].get("precision"))
    model, _ = models.make(config, tokenizer, shards, mesh, found, ["supervised"], products)
    model.lm_head = None
    if mesh.device.type == "cuda" and model.in_bfloat16():
        for weight in model.parameters():  # the dtype in which they compute in training
            weight.data = weight.data.to(torch.bfloat16)
    stage = stages.make("supervised", config, shards, mesh.data)
    interrupts.doing = "mining hard negatives"
    with mesh.together():
        stage.mine(model.eval(), mesh)
        stage.teach(mesh)
    if mesh.rank == 0:
        mining.tidy(stage.mined)
        for name, pools in stage.pools.items():
            print(
                f"{name}: {len(pools.queries):,} queries, {len(pools.corpus):,} documents, {pools.rule.index}: "
                f"pools of {pools.rule.pool} in {pools.folder}"
            )
    stage.close()
    mesh.close()
    if held:
        held.close()


if __name__ == "__main__":
    command.run(main)
