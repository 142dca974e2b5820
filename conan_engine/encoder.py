"""From texts to vectors with a trained run: what search, encode, evaluate and the mining of negatives all use."""

import numpy as np
import torch

from conan_engine import checkpoint
from conan_engine.cpu import settle_memory
from conan_engine.device import choose

BATCH_TOKENS = 16_384  # tokens a forward pass: enough to fill a CPU's cores, little memory


@torch.no_grad()
def embed_sequences(model, tokens, cu_seqlens, group=None):
    """Unit vectors float32 [B, C] of packed sequences (numpy: tokens int32 [T], cu_seqlens int32 [B+1]); bidirectional.

    Sequences of like length share a forward pass. With a `group` the passes are shared out over its ranks and every rank
    gets all vectors; which sequences share a pass does not depend on the number of ranks, so neither do the vectors.
    """
    device = model.embedding.device
    lengths = np.diff(cu_seqlens)
    by_length = np.argsort(lengths, kind="stable")
    passes = np.split(by_length, np.flatnonzero(np.diff(np.cumsum(lengths[by_length], dtype=np.int64) // BATCH_TOKENS)) + 1)
    rank, world = (group.rank, group.world) if group else (0, 1)
    out = torch.zeros(len(lengths), model.config.width, device=device)
    for rows in passes[rank::world]:
        part = torch.from_numpy(np.concatenate([tokens[cu_seqlens[i] : cu_seqlens[i + 1]] for i in rows] or [tokens[:0]])).to(device)
        part_cu = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths[rows]))).astype(np.int32)).to(device)
        out[torch.from_numpy(rows).to(device)] = torch.nn.functional.normalize(model.embed(part, part_cu), dim=-1)
    return (group.sum(out) if group else out).cpu().numpy()


class Encoder:
    """A model and its tokenizer; texts are cut to max_tokens (the context, of a loaded run); dims are the sizes it was trained to be truncated to."""

    def __init__(self, model, tokenizer, max_tokens, dims):
        self.model, self.tokenizer, self.max_tokens, self.dims = model.eval(), tokenizer, max_tokens, dims

    @classmethod
    def load(cls, run):
        """The newest weights of a run's last stage. Raises UserError if there are none or they do not fit."""
        settle_memory()
        return cls(*checkpoint.load_model(run, choose()))

    def encode(self, texts, dim=None):
        """Unit vectors float32 [len(texts), dim]: the first `dim` numbers of the embedding (all if None), normalised.
        Longer texts are cut to max_tokens; an empty text gives a zero vector."""
        encoded = [ids[: self.max_tokens] for ids in self.tokenizer.encode_batch(list(texts))]
        cu_seqlens = np.concatenate(([0], np.cumsum([len(ids) for ids in encoded]))).astype(np.int32)
        tokens = np.concatenate([np.asarray(ids, np.int32) for ids in encoded] or [np.zeros(0, np.int32)])
        return truncate(embed_sequences(self.model, tokens, cu_seqlens), dim)


def truncate(vectors, dim):
    """Matryoshka: the first `dim` numbers, to unit length again."""
    if dim is None or dim == vectors.shape[1]:
        return vectors
    vectors = vectors[:, :dim]
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
