"""The four stages: which data each reads, which attention mask it uses, which loss it minimises.

Every stage has

- `draw()`: this rank's batch of the next step;
- `backward(model, batch, step, before_last)`: adds the gradients of the global mean loss and returns the row to log,
  with what `sizes` counts. It calls before_last() before the last backward pass;
- `attention(step)`: the soft mask's alpha and kind;
- `teach(mesh)`: asks the teacher, before the first step;
- `state()` and `load_state()`: the position in the data;
- `close()`: ends the loaders.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from conan_engine.stages.language_modelling import LanguageModelling
from conan_engine.stages.supervised import Supervised
from conan_engine.stages.weak import Weak

if TYPE_CHECKING:
    from conan_engine.config import Config
    from conan_engine.data.shards import Shards
    from conan_engine.parallel.mesh import Group


def make(name: str, config: Config, shards: dict[tuple[str, str], Shards], group: Group) -> Any:
    """The stage `name` of a config.

    shards: Shards by (use, source), as datasets.prepare gives them. group: the ranks that share out the data.
    """
    mine, sts, texts = (
        {source: s for (use, source), s in shards.items() if use == wanted} for wanted in (name, "sts", "texts")
    )
    if name == "weak":
        return Weak(config, mine, texts, group)
    if name == "supervised":
        return Supervised(config, mine, sts, group)
    return LanguageModelling(name, config, mine, group)
