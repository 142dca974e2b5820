"""A run as a model of `mteb`.

import mteb
from conan_engine.mteb_adapter import Model
print(mteb.evaluate(Model("runs/demo", dim=256), mteb.get_tasks(tasks=["STS22.v2"])))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType

from conan_engine.data.encoding import join
from conan_engine.errors import UserError
from conan_engine.evaluation.encoder import Encoder
from conan_engine.run import checkpoint

if TYPE_CHECKING:
    import numpy as np


class Model(AbsEncoder):
    """mteb's encoder over the newest weights of a run: one unit vector per text, so similarity is cosine.

    Args:
        run: a run's folder, or a checkpoint's.
        dim: keep the first so many numbers of each vector; None keeps all.
        instructions: put the task's instruction before each query, as in training. Documents, sentence pairs and texts
            to classify get none. Give False for a model that was trained without instructions.

    Raises:
        UserError: if there is no run, or dim does not fit.
    """

    def __init__(self, run: str | Path, dim: int | None = None, instructions: dict[str, str] | None = True) -> None:
        self.encoder, self.dim, self.instructions = Encoder.load(run), dim, instructions
        width = self.encoder.model.config.width
        if dim is not None and not 1 <= dim <= width:
            raise UserError(f"dim is {dim}; expected 1 to {width}, the width of this model")
        facts = {
            "name": f"conan-engine/{Path(run).resolve().name}",
            "revision": checkpoint.newest(run)[0].name,
            "n_parameters": sum(p.numel() for p in self.encoder.model.parameters()),
            "max_tokens": self.encoder.max_tokens,
            "embed_dim": dim or width,
            "similarity_fn_name": ScoringFunction.COSINE,
            "framework": ["PyTorch"],
            "use_instructions": instructions,
        }
        self.mteb_model_meta = ModelMeta.create_empty(facts)

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **kwargs
    ) -> np.ndarray:
        """inputs: mteb's batches, dicts whose "text" lists the texts -> float32 [texts, dim]."""
        instruction = (
            self.get_instruction(task_metadata, prompt_type)
            if self.instructions and prompt_type == PromptType.query
            else ""
        )
        return self.encoder.encode([join(instruction, text) for batch in inputs for text in batch["text"]], self.dim)
