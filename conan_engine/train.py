"""Train an embedding model in up to four stages.

    torchrun [--nproc_per_node=N] conan_engine/train.py [CONFIG] [--KEY=VALUE]

CONFIG is a TOML file, such as configs/demo.toml, or the name of one that comes
with the engine (default: demo). --KEY=VALUE sets one of the settings below. The
same command again continues a run from its last checkpoint. SIGTERM and SIGUSR1
finish the step, save, and end the run with exit code 143. Without a checkout:
torchrun -m conan_engine.train, or conan-train, which is one process.

Examples:
    torchrun conan_engine/train.py configs/demo.toml --weak.lr=5e-4
    torchrun conan_engine/train.py configs/conan-1.4b.toml --plan_only=true
    torchrun conan_engine/train.py configs/finetune.toml --init_from=FOLDER \\
        --weak.data.pairs.jsonl=1 --supervised.data.pairs.jsonl=1
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if sys.path and Path(sys.path[0]) == Path(__file__).resolve().parent:
    del sys.path[0]  # as a script: modules of this folder (`data`, `model`, ...) must not hide other packages

from conan_engine import atomic, command, stages
from conan_engine.data import datasets
from conan_engine.errors import UserError
from conan_engine.evaluation.validation import Validation
from conan_engine.negatives import mining
from conan_engine.parallel import precision
from conan_engine.parallel.mesh import Mesh
from conan_engine.parallel.sharded_adamw import ShardedAdamW
from conan_engine.plan.report import report
from conan_engine.report import page, samples
from conan_engine.run import checkpoint, lock, models, resuming, versions
from conan_engine.run.counters import Counters, skipped
from conan_engine.run.interrupts import Interrupts
from conan_engine.run.log import Log
from conan_engine.run.pace import Pace
from conan_engine.run.saving import Saver
from conan_engine.settings import load
from conan_engine.settings.listing import as_help

if TYPE_CHECKING:
    from conan_engine.config import Stage


def main() -> None:
    # ---- settings and process group
    began = time.perf_counter()
    if command.answered(__doc__, *as_help()):
        return
    arguments, interrupts = sys.argv[1:], Interrupts()
    path = arguments.pop(0) if arguments and not arguments[0].startswith("--") else "demo"
    config = load(path, arguments)
    mesh = Mesh(config.device, config.tensor_parallel, config.timeout)
    run = Path(config.out_dir)
    report(config, mesh)
    if config.plan_only:
        return
    with mesh.together():
        held = lock.hold(run) if mesh.rank == 0 else None
    random.seed(config.seed + mesh.data.rank)
    np.random.seed(config.seed + mesh.data.rank)
    torch.manual_seed(config.seed + mesh.data.rank)

    # ---- where an earlier start of this run stopped: its newest whole checkpoint
    found = checkpoint.newest(run, config.stages, mesh)
    done_stage, done_step, todo = resuming.standing(found, config)
    under_way = done_stage if done_stage in todo and done_step else None
    changed = resuming.differences(*found, config, under_way) if found else ""
    if found and not under_way and found[1]["counters"].get("skipped_in_a_row"):
        raise UserError(skipped(config, done_stage, done_step - 1, found[1]["counters"]))

    # ---- text to token shards: rank 0 writes the missing ones, then every rank maps them
    interrupts.doing = "preparing data"
    with mesh.together():
        if mesh.rank == 0:
            datasets.prepare(config)
    tokenizer, shards, held_out = datasets.prepare(config)
    fingerprints = {use: {source: s.fingerprint for (u, source), s in shards.items() if u == use} for use, _ in shards}
    if found and under_way:
        resuming.check_data(*found, fingerprints, under_way)
    with mesh.together():
        if mesh.rank == 0:
            samples.keep(config, tokenizer, shards, held_out)

    # ---- model
    interrupts.doing = "making the model"
    products, why = precision.choose(config, mesh, found and found[1].get("precision"))
    model, base = models.make(config, tokenizer, shards, mesh, found, todo[:1], products)
    # the dtype of the weights that compute; the optimizer keeps float32 ones
    dtype = torch.bfloat16 if mesh.device.type == "cuda" and model.in_bfloat16() else torch.float32
    log = Log(run, mesh.rank == 0)
    log.resume(config.stages[: config.stages.index(done_stage)], done_stage, done_step)
    if why:
        log.say(why)
    if found:
        log.say(
            f"resuming after step {done_step} of {done_stage}, from {found[0]}" + (f"; {changed}" if changed else "")
        )
    if mesh.rank == 0:
        atomic.write(
            run / "config.json", lambda file: file.write(json.dumps(dataclasses.asdict(config), indent=1).encode())
        )
        versions.note(run, mesh)
    log.follow(config.log_to)

    # ---- the stages, each of which starts from the weights of the one before
    saver = Saver(
        config, tokenizer, fingerprints, mesh, base, began - (found[1].get("seconds", 0) if found else 0), products
    )
    for name in todo:
        settings = getattr(config, name)
        first_step = 0
        interrupts.doing = f"starting {name}"
        if name in ("weak", "supervised"):
            model.lm_head = None  # the contrastive stages predict no tokens
        # the first optimizer imports much of torch from C++, which an exception from a signal would abort
        with interrupts.later():
            optimizer = ShardedAdamW(model, mesh, settings.weight_decay, dtype)
        stage = stages.make(name, config, shards, mesh.data)
        pace = Pace(model, mesh)
        validation = Validation(name, config, held_out[name], mesh) if held_out.get(name) else None
        counters = Counters()
        with mesh.together():
            if found and name == done_stage and done_step > 0:
                first_step, counters = done_step, Counters(found[1]["counters"])
                checkpoint.load_training(*found, optimizer, stage, mesh)
            elif name == "supervised":
                interrupts.doing = "mining hard negatives"
                log.say(f"{interrupts.doing} ...")
                stage.mine(model.eval(), mesh)
            stage.teach(mesh)
        if name == "supervised" and mesh.rank == 0:
            mining.tidy(stage.mined)
        model.train()

        with contextlib.closing(stage), log.stage(name, settings.steps, first_step), interrupts.later():
            for step in range(first_step, settings.steps):
                pace.begin()
                batch = stage.draw()
                pace.drawn()
                row = stage.backward(model, batch, step, optimizer.send_next)
                norm = optimizer.reduce_gradients()
                lr = learning_rate(settings, step)
                if counters.count(row["loss"], norm):
                    optimizer.step(lr, scale=min(1.0, settings.clip / (norm + 1e-6)))
                else:
                    said = f"loss {row['loss']}, gradient norm {norm}: step skipped ({counters['skipped']} so far)"
                    log.say(f"{name} step {step}: {said}")
                optimizer.zero_gradients()
                last = step + 1 == settings.steps
                if last and settings.blend < 1:
                    optimizer.blend(models.before(name, config, tokenizer, shards, mesh), settings.blend)

                if config.skip_bad_records:
                    row["skipped_records"] = stage.skipped_records()
                row |= {"lr": lr, "gradient_norm": norm, "skipped": counters["skipped"], **pace.end(row)}
                del row["pairs"], row["learnt"]
                hopeless = counters["skipped_in_a_row"] == config.max_skips
                stopping = mesh.any(interrupts.asked is not None)
                best = False
                if validation and not stopping and validation.due(step, settings.steps):
                    row |= validation.measure(model, *stage.attention(step))
                    best = validation.is_best(row, step, counters)
                log.step(step, row, best)
                due = (step + 1) % config.save_every == 0 or (best and config.validation.keep_best)
                if due or last or hopeless or stopping:
                    saver.start(name, step + 1, optimizer, stage.state(), counters)
                    stopping = mesh.any(interrupts.asked is not None)  # a signal may have come meanwhile
                saver.poll()
                if last or hopeless or stopping:
                    saver.finish()
                    stopping = mesh.any(interrupts.asked is not None)
                if hopeless:
                    raise UserError(skipped(config, name, step, counters))
                if stopping:
                    interrupts.stop(f"after step {step + 1} of {name}, which is saved")
        if counters["skipped_in_a_row"]:
            raise UserError(skipped(config, name, settings.steps - 1, counters))
        optimizer.close()
    interrupts.doing = "drawing loss.png"
    log.draw()
    interrupts.ignore()
    saver.close()
    log.close()
    log.say(f"done: {run}/checkpoints, {run}/metrics.jsonl, {run}/loss.png")
    mesh.close()
    if held:
        page.write_at_end(run, log.say)
        held.close()


def learning_rate(settings: Stage, step: int) -> float:
    """The learning rate of a step: it rises linearly over the share `warmup` of the steps, then falls linearly to
    `final_lr` of lr.
    """
    warmup = settings.warmup * settings.steps
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return settings.lr * (1 - (1 - settings.final_lr) * progress)


if __name__ == "__main__":
    command.run(main)
