"""Checkpoints that a crash cannot spoil: written beside, checksummed, renamed; a damaged one is passed over for the one before."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from conan_engine import config as settings
from conan_engine.data.tokenizer import Tokenizer
from conan_engine.errors import UserError
from conan_engine.model import Transformer


def save(config, tokenizer, data, stage, step, optimizer, stage_state, counters, mesh):
    """Write RUN/checkpoints/<stage>-<step>, complete or not at all. Collective: every rank calls it, rank 0 writes.

    It holds the weights, both AdamW moments, the stage's own state (negative pools), the RNGs of every rank, the step
    (all there is to the data's position and the schedules) and `counters`, with a digest of each file; and for whoever goes
    on from it `config` and `data`, {use: {source: fingerprint of its shards}}.
    """
    tensors = optimizer.state()  # gathered from all ranks
    rngs = mesh.data.gather_objects(_rng_state())
    if mesh.rank == 0:
        folder = Path(config.out_dir, "checkpoints")
        final, partial = folder / f"{stage}-{step:08d}", folder / f".{stage}-{step:08d}.partial"
        state = {
            "stage": stage,
            "step": step,
            "counters": counters,
            "tokenizer": tokenizer.hash,
            "data": data,
            "config": dataclasses.asdict(config),
            "rngs": rngs,
        }
        weights = {name.removeprefix("weight."): tensors.pop(name) for name in list(tensors) if name.startswith("weight.")}
        own = {name: torch.from_numpy(array) for name, array in stage_state.items()}
        try:
            _write(partial, state, model=weights, optimizer=tensors, stage=own)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _sync(folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"{final}: cannot write it ({error}); make room or free the folder, then start the same command again: "
                f"it goes on from the checkpoint before"
            ) from None
        best = counters.get("best")
        for old in _checkpoints(config.out_dir, stage)[config.keep :]:
            if not (config.validation.keep_best and best and old.name == f"{stage}-{best['step']:08d}"):
                shutil.rmtree(old)
    mesh.barrier()


def newest(run, stages=settings.STAGES):
    """The newest whole checkpoint of a run among `stages`: (folder, its state.json), or None. Says which it passes over. `run` may
    be one checkpoint's folder: that one."""
    if Path(run, "state.json").exists():
        damage = _damage(Path(run))
        if damage:
            raise UserError(f"{run}: damaged ({damage}); take another checkpoint")
        return Path(run), json.loads(Path(run, "state.json").read_text())
    for stage in reversed(settings.STAGES):
        for folder in _checkpoints(run, stage) if stage in stages else ():
            damage = _damage(folder)
            if damage is None:
                return folder, json.loads((folder / "state.json").read_text())
            print(f"checkpoint {folder} is damaged ({damage}); using the one before it", flush=True)
    return None


def load_weights(folder, state, model, model_config, tokenizer):
    """Copy a checkpoint's weights into `model`, in place. Raises UserError for another shape or another tokenizer."""
    for key, ours in dataclasses.asdict(model_config).items():
        theirs = state["config"]["model"].get(key)
        if theirs != ours:
            raise UserError(f"{folder}: was trained with model.{key} = {theirs!r}, this config says {ours!r}; use its value, or another run folder")
    if state["tokenizer"] != tokenizer.hash:
        raise UserError(
            f"{folder}: was trained with tokenizer {state['tokenizer'][:12]}, this run has {tokenizer.hash[:12]}; "
            f"set tokenizer.path to the tokenizer.model of that run"
        )
    weights = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(p.split_by.cut(weights[name], model.tensor.group) if hasattr(p, "split_by") else weights[name])


def load_training(folder, state, optimizer, stage, mesh):
    """Bring optimiser, stage and RNGs to where `save` found them."""
    optimizer.load_state(load_file(folder / "optimizer.safetensors"), state["counters"]["updates"])
    stage.load_state({name: tensor.numpy() for name, tensor in load_file(folder / "stage.safetensors").items()})
    rng = state["rngs"][mesh.data.rank % len(state["rngs"])]
    version, internal, gauss = rng["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = rng["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(rng["torch"])), dtype=torch.uint8))
    if torch.cuda.is_available() and rng["cuda"]:
        torch.cuda.set_rng_state(torch.tensor(list(bytes.fromhex(rng["cuda"])), dtype=torch.uint8))


def load_model(run, device="cpu"):
    """(model, tokenizer, longest text in tokens, Matryoshka dims) of a run's newest whole checkpoint, or of the one whose folder
    `run` is. Raises UserError where there is none."""
    home = Path(run).parent.parent if Path(run, "state.json").exists() else Path(run)
    tokenizer_path = home / "tokenizer.model"
    if not tokenizer_path.exists():
        raise UserError(f"{run}: no trained run here (tokenizer.model is missing); train one with torchrun conan_engine/train.py --out_dir={run}")
    found = newest(run)
    if found is None:
        raise UserError(f"{run}: no whole checkpoint in {run}/checkpoints; train one with torchrun conan_engine/train.py --out_dir={run}")
    folder, state = found
    config = settings.from_dict(state["config"], f"{folder}/state.json")
    tokenizer = Tokenizer.load(tokenizer_path)
    model = Transformer(config.model, tokenizer.vocab_size, config.precision).to(device)
    load_weights(folder, state, model, config.model, tokenizer)
    return model, tokenizer, config.model.context, config.supervised.dims


def _write(folder, state, **tensors):
    """NAME.safetensors for each dict of tensors, and `state` with a digest of each file as state.json, down on the disk."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in tensors.items():
        save_file(content, folder / f"{name}.safetensors")
    digests = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    (folder / "state.json").write_text(json.dumps({**state, "digests": digests}))
    for path in (*folder.iterdir(), folder):
        _sync(path)


def _checkpoints(run, stage):
    """A stage's finished checkpoint folders, newest first."""
    return sorted(Path(run, "checkpoints").glob(f"{stage}-*"), reverse=True)


def _damage(folder):
    """What is wrong with a checkpoint, or None."""
    try:
        digests = json.loads((folder / "state.json").read_text())["digests"]
        for name, digest in digests.items():
            if _digest(folder / name) != digest:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _sync(path):
    """To the disk: without it a power cut could leave a renamed folder of empty files."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _rng_state():
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
        "cuda": bytes(torch.cuda.get_rng_state().tolist()).hex() if torch.cuda.is_available() else "",
    }
