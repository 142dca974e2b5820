"""Reading checkpoints (saving.py writes them): a damaged one is passed over for the one before."""

import dataclasses
import hashlib
import json
import os
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from conan_engine import config as settings
from conan_engine.data.tokenizer import Tokenizer
from conan_engine.errors import UserError
from conan_engine.model import Transformer
from conan_engine.pieces import Pieces


def newest(run, stages=settings.STAGES, mesh=None):
    """The newest whole checkpoint of a run among `stages`: (folder, its state.json), or None. Says which it passes over. `run` may
    be one checkpoint's folder: that one. mesh: the ranks that ask for it together; each reads some of the files."""
    if Path(run, "state.json").exists():
        damage = _damage(Path(run), mesh)
        if damage:
            raise UserError(f"{run}: damaged ({damage}); take another checkpoint")
        return Path(run), json.loads(Path(run, "state.json").read_text())
    for stage in reversed(settings.STAGES):
        there = of_stage(run, stage) if stage in stages else []
        for folder in mesh.gather_objects(there)[0] if mesh else there:  # machines may see a shared folder differently for a while
            damage = _damage(folder, mesh)
            if damage is None:
                return folder, json.loads((folder / "state.json").read_text())
            if mesh is None or mesh.rank == 0:
                print(f"checkpoint {folder} is damaged ({damage}); using the one before it", flush=True)
    return None


def load_weights(folder, state, model, model_config, tokenizer):
    """Copy a checkpoint's weights into `model`, in place. Raises UserError for another shape or another tokenizer."""
    trained = dataclasses.asdict(settings.from_dict(state["config"], f"{folder}/state.json").model)
    for key, ours in dataclasses.asdict(model_config).items():
        theirs = trained[key]
        if theirs != ours:
            raise UserError(f"{folder}: was trained with model.{key} = {theirs!r}, this config says {ours!r}; use its value, or another run folder")
    if state["tokenizer"] != tokenizer.hash:
        raise UserError(
            f"{folder}: was trained with tokenizer {state['tokenizer'][:12]}, this run has {tokenizer.hash[:12]}; "
            f"set tokenizer.path to the tokenizer.model of that run"
        )
    weights = _pieces(folder, state, "model")
    for name, p in model.named_parameters():
        try:
            weights.read_into(p.detach().view(-1), name, p, model.tensor.group)
        except KeyError:
            raise UserError(f"{folder}: holds no {name}: it was saved by a stage that does without; start from one of an earlier stage, or set model.tied = true") from None


def load_training(folder, state, optimizer, stage, mesh):
    """Bring optimiser, stage and RNGs to where they were saved. The model's weights are loaded apart, before the optimiser is made."""
    optimizer.load_state(_pieces(folder, state, "optimizer"), state["counters"]["updates"])
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
    tokenizer_path = Tokenizer.of(home)
    if tokenizer_path is None:
        raise UserError(f"{run}: no trained run here (tokenizer.model is missing); train one with torchrun conan_engine/train.py --out_dir={run}")
    found = newest(run)
    if found is None:
        raise UserError(f"{run}: no whole checkpoint in {run}/checkpoints; train one with torchrun conan_engine/train.py --out_dir={run}")
    folder, state = found
    config = settings.from_dict(state["config"], f"{folder}/state.json")
    tokenizer = Tokenizer.load(tokenizer_path)
    model = Transformer(config.model, tokenizer.vocab_size, config.precision).to(device)
    model.lm_head = None
    load_weights(folder, state, model, config.model, tokenizer)
    return model, tokenizer, config.model.context, config.supervised.dims


def of_stage(run, stage):
    """A stage's finished checkpoint folders, newest first."""
    return sorted(Path(run, "checkpoints").glob(f"{stage}-*"), reverse=True)


def _pieces(folder, state, sort):
    return Pieces(folder / name for name in state["digests"] if name.startswith(sort))


def _damage(folder, mesh):
    """What is wrong with a checkpoint, or None."""
    if mesh is None:
        return _damage_of(folder)
    return next(filter(None, mesh.of_all(lambda: _damage_of(folder, mesh.rank, mesh.world))), None)


def _damage_of(folder, rank=0, world=1):
    """As `_damage`, of the files that are this rank's to read."""
    try:
        digests = json.loads((folder / "state.json").read_text())["digests"]
        for name in sorted(digests)[rank::world]:
            if digest(folder / name) != digests[name]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def digest(path):
    """Of a file's bytes, a string."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def sync(path):
    """To the disk: without it a power cut could leave a renamed folder of empty files."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
