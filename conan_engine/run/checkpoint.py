"""Read checkpoints (saving.py writes them). If one is damaged, the one before it is used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from conan_engine.config import STAGES, chosen_layers
from conan_engine.data import gguf_file
from conan_engine.data.tokenizer import Tokenizer
from conan_engine.errors import UserError
from conan_engine.model import llama, lora, pretrained
from conan_engine.model.transformer import Transformer
from conan_engine.parallel.device import check_heads
from conan_engine.run.pieces import Pieces
from conan_engine.settings import from_dict

if TYPE_CHECKING:
    from conan_engine.data.tokenizer import AnyTokenizer
    from conan_engine.parallel.mesh import Mesh
    from conan_engine.parallel.sharded_adamw import ShardedAdamW


def newest(
    run: str | Path, stages: Sequence[str] = STAGES, mesh: Mesh | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a run among `stages`: (folder, its state.json), or None. Prints which it passes
    over.

    run: a run's folder, or one checkpoint's. mesh: the ranks that call this together; each checks some of the files.
    """
    if Path(run, "state.json").exists():
        damage = _damage(Path(run), mesh)
        if damage:
            raise UserError(f"{run}: damaged ({damage}); use another checkpoint")
        return Path(run), json.loads(Path(run, "state.json").read_text())
    for stage in reversed(STAGES):
        there = of_stage(run, stage) if stage in stages else []
        # machines may see different contents of a shared folder for a while
        for folder in mesh.gather_objects(there)[0] if mesh else there:
            damage = _damage(folder, mesh)
            if damage is None:
                return folder, json.loads((folder / "state.json").read_text())
            if mesh is None or mesh.rank == 0:
                print(f"checkpoint {folder} is damaged ({damage}); using the one before it", flush=True)
    return None


def start_from(
    start: str | Path,
    model: Transformer,
    tokenizer: AnyTokenizer,
    mesh: Mesh | None = None,
    layers: list[int] | None = None,
) -> None:
    """Copy the weights of init_from into `model`: a transformers folder's, a GGUF file's, or a run's newest.

    layers: as config.chosen_layers gives them. Raises UserError for anything else, and for a model that does not fit.
    """
    if gguf_file.is_gguf(start) or pretrained.is_transformers(start):
        llama.load_weights(start, model, layers)
        return
    found = newest(start, mesh=mesh)
    if found is None:
        raise UserError(
            f"init_from: {start} is neither a run with a whole checkpoint, nor a folder of transformers, nor a "
            ".gguf file; name one of these, or leave init_from empty"
        )
    load_weights(*found, model, tokenizer, mesh, layers)


def base_of(start: str | Path, mesh: Mesh | None = None) -> dict[str, str]:
    """What identifies the weights of init_from, beside which adapters are saved: {"folder", "digest"}."""
    if gguf_file.is_gguf(start):
        folder, files = Path(start), [Path(start)]
    elif pretrained.is_transformers(start):
        folder, files = Path(start), sorted(Path(start).glob("*.safetensors"))
    else:
        folder = newest(start, mesh=mesh)[0]
        files = [folder / "state.json"]  # it has the digests of the other files

    def digests():
        return "".join(map(digest, files)) if mesh is None or mesh.rank == 0 else None

    return {"folder": str(folder.resolve()), "digest": mesh.of_all(digests)[0] if mesh else digests()}


def load_base(
    folder: Path,
    state: dict[str, Any],
    model: Transformer,
    tokenizer: AnyTokenizer,
    mesh: Mesh | None = None,
    layers: list[int] | None = None,
) -> None:
    """Copy the weights that a checkpoint's adapters belong to into `model`. Raises UserError if they have changed.

    layers: those of the checkpoint, as config.chosen_layers gives them.
    """
    base = state["base"]
    if not Path(base["folder"]).exists() or base_of(base["folder"], mesh) != base:
        raise UserError(f"{folder}: holds adapters of {base['folder']}, which is missing or has changed; restore it")
    own = chosen_layers(state["config"].get("init_layers"))
    start_from(base["folder"], model, tokenizer, mesh, [own[i] for i in layers] if own and layers else own or layers)


def load_weights(
    folder: Path,
    state: dict[str, Any],
    model: Transformer,
    tokenizer: AnyTokenizer,
    mesh: Mesh | None = None,
    layers: list[int] | None = None,
) -> None:
    """Copy a checkpoint's weights into `model`, in place.

    A plain model gets all weights, with adapters merged; a model with adapters gets these. layers: as
    config.chosen_layers gives them. Raises UserError for another shape or another tokenizer.
    """
    config = from_dict(state["config"], f"{folder}/state.json")
    trained = dataclasses.asdict(config.model)
    if layers is not None:
        trained["layers"] = len(layers)
    for key, ours in dataclasses.asdict(model.config).items():
        theirs = trained[key]
        if theirs != ours:
            raise UserError(
                f"{folder}: was trained with model.{key} = {theirs!r}, this config says {ours!r}; use its "
                "value, or another run folder"
            )
    if state["tokenizer"] != tokenizer.hash:
        raise UserError(
            f"{folder}: was trained with tokenizer {state['tokenizer'][:12]}, this run has {tokenizer.hash[:12]}; "
            f"set tokenizer.path to the tokenizer.model of that run"
        )
    merge = config.lora.rank and all(p.requires_grad for p in model.parameters())
    if merge:
        load_base(folder, state, model, tokenizer, mesh, layers)
        lora.adapt(model, config.lora, seed=0)
    weights = _pieces(folder, state, "model")
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        try:
            weights.read_into(p.detach().view(-1), pretrained.source(name, layers), p, model.tensor.group)
        except KeyError:
            raise UserError(
                f"{folder}: holds no {name}, since the stage that saved it has none; start from a checkpoint "
                "of an earlier stage, or set model.tied = true"
            ) from None
    if merge:
        lora.merge(model)


def load_training(folder: Path, state: dict[str, Any], optimizer: ShardedAdamW, stage: Any, mesh: Mesh) -> None:
    """Restore optimizer, stage and random number generators. The weights are loaded apart, before the optimizer is
    made.
    """
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


class Loaded(NamedTuple):
    """max_tokens: of a text; dims: Matryoshka's; digest: of the weights and all else that the checkpoint holds."""

    model: Transformer
    tokenizer: AnyTokenizer
    max_tokens: int
    dims: list[int]
    digest: str


def load_model(run: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """What a run's newest whole checkpoint holds.

    run: a run's folder, or one checkpoint's. Raises UserError if there is none.
    """
    home = Path(run).parent.parent if Path(run, "state.json").exists() else Path(run)
    tokenizer_path = Tokenizer.of(home)
    if tokenizer_path is None:
        raise UserError(
            f"{run}: no trained run here (tokenizer.model is missing); train one with torchrun "
            f"conan_engine/train.py --out_dir={run}"
        )
    found = newest(run)
    if found is None:
        raise UserError(
            f"{run}: no whole checkpoint in {run}/checkpoints; train one with torchrun conan_engine/train.py "
            f"--out_dir={run}"
        )
    folder, state = found
    config = from_dict(state["config"], f"{folder}/state.json")
    tokenizer = Tokenizer.load(tokenizer_path)
    check_heads(torch.device(device), config.model.head)
    model = Transformer(config.model, tokenizer.vocab_size, config.precision).to(device)
    model.lm_head = None
    load_weights(folder, state, model, tokenizer)
    return Loaded(model, tokenizer, config.model.context, config.supervised.dims, digest(folder / "state.json"))


def of_stage(run: str | Path, stage: str) -> list[Path]:
    """The folders of a stage's finished checkpoints, newest first."""
    return sorted(Path(run, "checkpoints").glob(f"{stage}-*"), reverse=True)


def _pieces(folder, state, sort):
    return Pieces(folder / name for name in state["digests"] if name.startswith(sort))


def _damage(folder, mesh):
    """What is wrong with a checkpoint, or None."""
    if mesh is None:
        return _damage_of(folder)
    return next(filter(None, mesh.of_all(lambda: _damage_of(folder, mesh.rank, mesh.world))), None)


def _damage_of(folder, rank=0, world=1):
    """The same as `_damage`, for the files that this rank checks."""
    try:
        digests = json.loads((folder / "state.json").read_text())["digests"]
        for name in sorted(digests)[rank::world]:
            if digest(folder / name) != digests[name]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def digest(path: str | Path) -> str:
    """The digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def sync(path: str | Path) -> None:
    """Flush a file or folder to disk: after a power cut, a renamed folder could otherwise hold empty files."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
