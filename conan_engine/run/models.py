"""Make the model of a run: from its checkpoint, from init_from, or from random weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from conan_engine.config import chosen_layers
from conan_engine.errors import UserError
from conan_engine.model import initial, lora, whitening
from conan_engine.model.transformer import Transformer
from conan_engine.run import checkpoint

if TYPE_CHECKING:
    from conan_engine.config import Config
    from conan_engine.data.shards import Shards
    from conan_engine.data.tokenizer import AnyTokenizer
    from conan_engine.parallel.mesh import Mesh


def make(
    config: Config,
    tokenizer: AnyTokenizer,
    shards: dict[tuple[str, str], Shards],
    mesh: Mesh,
    found: tuple[Path, dict[str, Any]] | None,
    first: list[str],
    products: str | None = None,
) -> tuple[Transformer, dict[str, str] | None]:
    """Make the model that continues from the checkpoint `found`, or starts if it is None.

    first: a list that holds the first stage to train. products: the precision, or None for the config's. Returns
    (model, what identifies the frozen weights that trained adapters belong to, or None if all weights are trained).
    """
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if vocab_size % config.tensor_parallel:
        raise UserError(
            f"tokenizer.path: its {vocab_size} tokens are not a multiple of tensor_parallel = "
            f"{config.tensor_parallel}; use another number of tensor ranks"
        )
    if vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"tokenizer.path: its {tokenizer.vocab_size} tokens are more than model.vocab_size = {vocab_size}; "
            "take the tokenizer that the model came with"
        )
    model = Transformer(config.model, vocab_size, products or config.precision, mesh.tensor, config.recompute).to(
        mesh.device
    )
    if first not in (["pretrain"], ["sft"]):
        model.lm_head = None  # the checkpoint may have none any more
    base, layers = None, chosen_layers(config.init_layers)
    if config.lora.rank:
        if found:
            checkpoint.load_base(*found, model, tokenizer, mesh)
        else:
            checkpoint.start_from(config.init_from, model, tokenizer, mesh, layers)
        base = found[1]["base"] if found else checkpoint.base_of(config.init_from, mesh)
        lora.adapt(model, config.lora, config.seed)
    elif config.init_from and not found:
        checkpoint.start_from(config.init_from, model, tokenizer, mesh, layers)
        if config.init_whiten:
            of_stage = [source for (stage, _), source in shards.items() if stage == first[0]]
            whitening.start(model, of_stage, tokenizer.vocab_size, config.init_whiten, mesh)
    elif not found:
        model.init_weights(config.seed)
        initial.start(model, tokenizer, shards.values(), config)
    if found:
        checkpoint.load_weights(*found, model, tokenizer, mesh)
    return model, base


def before(
    name: str, config: Config, tokenizer: AnyTokenizer, shards: dict[tuple[str, str], Shards], mesh: Mesh
) -> Transformer:
    """The model with the weights that the stage `name` began with."""
    earlier = config.stages[: config.stages.index(name)][-1:]
    found = checkpoint.newest(config.out_dir, earlier, mesh)
    if earlier and not found:
        raise UserError(
            f"{config.out_dir}/checkpoints: holds no checkpoint of {earlier[0]} any more, which {name}.blend = "
            f"{getattr(config, name).blend} needs; restore it, or set {name}.blend = 1"
        )
    with mesh.together():
        return make(config, tokenizer, shards, mesh, found, [name])[0]
