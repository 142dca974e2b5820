"""What all stages share: their loaders by name, and the position of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from conan_engine.data.loader import Loader
from conan_engine.data.tokenizer import Tokenizer
from conan_engine.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from conan_engine.config import Config, Source
    from conan_engine.data.shards import Shards
    from conan_engine.data.tokenizer import AnyTokenizer
    from conan_engine.parallel.mesh import Group, Mesh


class Stage:
    """What all stages share: their loaders by name, and the position of each."""

    def __init__(self, name: str, config: Config, group: Group) -> None:
        self.name, self.config, self.settings, self.group, self.loaders = name, config, getattr(config, name), group, {}

    def add_loader(self, name: str, shards: dict[str, Shards], data: dict[str, Source], key: str, **options) -> None:
        """Add a loader. key: the setting that says how much is in a step, over all ranks. Raises UserError if the ranks
        cannot split it evenly.
        """
        batch, world = getattr(self.settings, key), self.group.world
        if key != "batch_tokens" and batch % world:
            raise UserError(
                f"{self.name}.{key} is {batch}, which {world} ranks cannot split evenly; use a multiple of {world}"
            )
        weights = {source: about.weight for source, about in data.items()}
        self.loaders[name] = Loader(
            shards, weights, batch=batch, max_tokens=self.settings.max_tokens, size_power=self.settings.size_power,
            seed=self.config.seed,
            group=self.group, threads=self.config.loader_threads, skip_bad_records=self.config.skip_bad_records,
            **options,
        )  # fmt: skip

    def draw(self) -> Any:
        """This rank's batch of the next step."""
        return self.loaders["data"].next()

    def teach(self, mesh: Mesh) -> None:
        """Ask the stage's teacher, unless its answers are kept from before. All ranks take part; none is in a
        collective.
        """

    def state(self) -> dict[str, np.ndarray]:
        """The position of each loader, as arrays for the checkpoint."""
        return {f"loader/{name}": loader.state for name, loader in self.loaders.items()}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from the position that `state` gave."""
        for name, loader in self.loaders.items():
            loader.state = state[f"loader/{name}"]

    def skipped_records(self) -> int:
        """Records left out over all ranks since this process began."""
        return int(
            self.group.sum(
                torch.tensor(sum(loader.skipped for loader in self.loaders.values()), device=self.group.device)
            )
        )

    def close(self) -> None:
        for loader in self.loaders.values():
            loader.close()


def tokenizer_of(config: Config) -> AnyTokenizer:
    """The tokenizer in the run's folder."""
    return Tokenizer.load(Tokenizer.of(config.out_dir) or "")
