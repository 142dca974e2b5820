"""A run as `mteb` takes it:

    import mteb
    from conan_engine.mteb_adapter import Model
    print(mteb.evaluate(Model("runs/demo", dim=256), mteb.get_tasks(tasks=["STS22.v2"])))
"""

from pathlib import Path

from mteb.models import ModelMeta
from mteb.models.model_meta import ScoringFunction
from mteb.similarity_functions import cos_sim, pairwise_cos_sim

from conan_engine import checkpoint
from conan_engine.encoder import Encoder
from conan_engine.errors import UserError


class Model:
    """mteb's EncoderProtocol over the newest weights of a run; every text to one unit vector, so similarity is cosine.

    dim: Matryoshka, only the first `dim` numbers (None: all). Raises UserError if there is no run, or no such dim.
    """

    def __init__(self, run, dim=None):
        self.encoder, self.dim = Encoder.load(run), dim
        width = self.encoder.model.config.width
        if dim is not None and not 1 <= dim <= width:
            raise UserError(f"dim is {dim}; this model has 1 to {width}")
        facts = {
            "name": f"conan-engine/{Path(run).resolve().name}",
            "revision": checkpoint.newest(run)[0].name,
            "n_parameters": sum(p.numel() for p in self.encoder.model.parameters()),
            "max_tokens": self.encoder.max_tokens,
            "embed_dim": dim or width,
            "similarity_fn_name": ScoringFunction.COSINE,
            "framework": ["PyTorch"],
        }
        self.mteb_model_meta = ModelMeta.create_empty(facts)

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs):
        """inputs: mteb's batches, dicts whose "text" lists the texts, instructions included -> float32 [texts, dim]."""
        return self.encoder.encode([text for batch in inputs for text in batch["text"]], self.dim)

    def similarity(self, first, second):
        """Cosine of every pair: [N, E] and [M, E] -> tensor [N, M]."""
        return cos_sim(first, second)

    def similarity_pairwise(self, first, second):
        """Cosine of rows i and i: [N, E] twice -> tensor [N]."""
        return pairwise_cos_sim(first, second)
