"""Report what a run needs before anything is allocated."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from conan_engine.errors import UserError
from conan_engine.model import lora
from conan_engine.model.transformer import count_parameters, memory_per_device
from conan_engine.parallel.device import check_heads

if TYPE_CHECKING:
    from conan_engine.config import Config
    from conan_engine.parallel.mesh import Mesh


def report(config: Config, mesh: Mesh) -> None:
    """Print the size of the model and the memory that a device needs. Raises UserError if the device has too little."""
    vocab, ranks = config.model.vocab_size or config.tokenizer.vocab_size, mesh.data.world
    adapters = lora.count(config.model, config.lora) if config.lora.rank else None

    def memory(tokens):
        bfloat16 = mesh.device.type == "cuda" and config.precision != "float32"
        return memory_per_device(
            config.model, vocab, tokens, ranks, mesh.tensor.world, bfloat16, config.recompute, adapters
        )

    check_heads(mesh.device, config.model.head)
    needs = 0
    for name in config.stages:
        stage = getattr(config, name)
        beside = stage.texts_batch // ranks if name == "weak" and stage.texts else 0
        at_once = stage.chunk or max(1, stage.batch // ranks) * (1 if name in ("pretrain", "sft") else 2) + beside
        tokens = at_once * stage.max_tokens
        if name == "weak" and stage.batch_tokens:
            everything = stage.batch_tokens // ranks + beside * stage.max_tokens
            tokens = min(tokens, everything) if stage.chunk else everything
        needs = max(needs, memory(tokens))
    fixed = memory(0)
    if mesh.device.type == "cuda":
        has = torch.cuda.mem_get_info()[1]
    else:
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # the ranks of this machine share it
    if mesh.rank == 0:
        print(
            f"{count_parameters(config.model, vocab) / 1e6:,.0f}M parameters"
            + (f", {adapters / 1e6:,.2f}M of them in adapters trained" if adapters else "")
            + f"; per device ({mesh.world} in all) "
            f"{fixed / 2**30:.2f} GiB of weights, gradients and optimizer state, at most "
            f"{needs / 2**30:.1f} GiB with activations; "
            f"this one has {has / 2**30:.1f} GiB",
            flush=True,
        )
    if fixed > has and not config.plan_only:
        raise UserError(
            f"the model needs {fixed / 2**30:.1f} GiB a device before activations, and this one has "
            f"{has / 2**30:.1f} GiB; "
            "use more ranks, which share out the optimizer's state, tensor_parallel, which shares out the weights, "
            "or a smaller [model]"
        )
