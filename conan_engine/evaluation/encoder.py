"""Texts to vectors with a trained run, as search, encode, evaluate and the mining of negatives use it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from conan_engine.errors import UserError
from conan_engine.parallel.cpu import settle_memory
from conan_engine.parallel.device import choose
from conan_engine.run import checkpoint
from conan_engine.vectors.windows import Reading, packed

if TYPE_CHECKING:
    from torch import Tensor

    from conan_engine.data.tokenizer import AnyTokenizer
    from conan_engine.model.transformer import Transformer
    from conan_engine.parallel.mesh import Group
    from conan_engine.vectors.corpus import Corpus


BATCH_TOKENS = 16_384  # tokens of a forward pass: enough for all cores of a CPU, little memory
THREAD_TOKENS = 4096  # the same, for one core
NUMBERS = 2**23  # of the vectors of a window of a corpus, at most
ROWS = 2**14  # documents of a window, at most


@torch.no_grad()
def embed_sequences(
    model: Transformer,
    tokens: np.ndarray,
    cu_seqlens: np.ndarray,
    group: Group | None = None,
    alpha: float = 1.0,
    mask: str = "column",
) -> np.ndarray:
    """Unit vectors float32 [B, C] of packed sequences, bidirectional unless alpha and mask say otherwise.

    tokens: int32 [T]; cu_seqlens: int [B+1], both numpy. With a `group`, its ranks share out the passes and every
    rank gets all vectors. Which sequences share a pass does not depend on the number of ranks, so neither do the
    vectors.
    """
    device = model.embedding.device
    rank, world = (group.rank, group.world) if group else (0, 1)
    out = torch.zeros(len(cu_seqlens) - 1, model.config.width, device=device)
    for rows in passes(cu_seqlens)[rank::world]:
        vectors = model.embed(*pick(tokens, cu_seqlens, rows, device), alpha, mask)
        out[torch.from_numpy(rows).to(device)] = torch.nn.functional.normalize(vectors, dim=-1)
    return (group.sum(out) if group else out).cpu().numpy()


def embedder(model: Transformer) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """embed(tokens, cu_seqlens), the same as embed_sequences of a bidirectional model.

    On a CPU each pass has one thread, so that the bits do not depend on the number of threads: an operation that
    several share computes the ends of each share with other instructions, which round differently.
    """
    if model.embedding.is_cuda:
        return functools.partial(embed_sequences, model)
    pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))

    def embed(tokens, cu_seqlens):
        out = np.zeros((len(cu_seqlens) - 1, model.config.width), np.float32)

        @torch.no_grad()
        def work(rows):
            vectors = model.embed(*pick(tokens, cu_seqlens, rows, model.embedding.device), alpha=1.0)
            out[rows] = torch.nn.functional.normalize(vectors, dim=-1).numpy()

        longest_first = passes(cu_seqlens, THREAD_TOKENS)[::-1]
        for _ in pool.map(work, longest_first):
            pass
        return out

    return embed


def passes(cu_seqlens: np.ndarray, most: int = BATCH_TOKENS) -> list[np.ndarray]:
    """The sequences, by number, of each forward pass: sequences of similar length, about `most` tokens in all."""
    lengths = np.diff(cu_seqlens)
    by_length = np.argsort(lengths, kind="stable")
    return np.split(by_length, np.flatnonzero(np.diff(np.cumsum(lengths[by_length], dtype=np.int64) // most)) + 1)


def pick(values: np.ndarray, cu_seqlens: np.ndarray, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Some of the packed sequences, by number: (values, cu_seqlens int32) on the device."""
    part = np.concatenate([values[cu_seqlens[i] : cu_seqlens[i + 1]] for i in rows] or [values[:0]])
    part_cu = np.concatenate(([0], np.cumsum(np.diff(cu_seqlens)[rows]))).astype(np.int32)
    return torch.from_numpy(part).to(device), torch.from_numpy(part_cu).to(device)


class Encoder:
    """A model and its tokenizer.

    Texts are cut to max_tokens (for a loaded run, the context). dims are its Matryoshka dims. alpha is how far the soft
    mask is open, from causal (0) to bidirectional (1). weights: a digest of what was loaded.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: AnyTokenizer,
        max_tokens: int,
        dims: Sequence[int],
        alpha: float = 1.0,
        weights: str = "",
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.dims = dims
        self.alpha = alpha
        self.weights = weights

    @classmethod
    def load(cls, run: str | Path) -> Encoder:
        """Load the newest weights of a run's last stage, to this rank's device.

        On a CPU the products are float32 even where bfloat16 is faster: vectors are compared with others that were made
        elsewhere. run: a run's folder, or a checkpoint's. Raises UserError if there is no run or it does not fit.
        """
        settle_memory()
        found = checkpoint.load_model(run, choose(index=int(os.environ.get("LOCAL_RANK", 0))))
        if found.model.embedding.device.type == "cpu":
            found.model.precision = "float32"
        return cls(found.model, found.tokenizer, found.max_tokens, found.dims, weights=found.digest)

    @property
    def device(self) -> torch.device:
        return self.model.embedding.device

    def checked(self, dim: int | None) -> int:
        """The numbers of a vector: `dim`, or all for None. Raises UserError if the model has not so many."""
        width = self.model.config.width
        if dim is not None and not 1 <= dim <= width:
            raise UserError(f"--dim is {dim}; expected 1 to {width}, the width of this model")
        return width if dim is None else dim

    def about(self, corpus: Corpus, dim: int, precision: str, given_ranges: str | bool = False) -> dict[str, Any]:
        """What identifies the vectors of a corpus: index.json has it. given_ranges: a digest of those, for int8."""
        return {
            "source": corpus.name,
            "files": corpus.files(),
            "instruction": corpus.instruction,
            "dim": dim,
            "precision": precision,
            "given_ranges": given_ranges,
            "weights": self.weights,
            "max_tokens": self.max_tokens,
        }

    def reading(self, corpus: Corpus) -> Reading:
        """How a corpus is read for this model."""
        rows = max(1, min(ROWS, NUMBERS // self.model.config.width))
        return Reading(corpus, self.tokenizer, self.max_tokens, rows)

    def windows(self, dim: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """What embeds a window of `reading`: (tokens int32 [T], cu_seqlens int64 [B+1]) -> float32 [B, dim]."""
        embed = embedder(self.model)
        return lambda tokens, cu_seqlens: truncate(embed(tokens, cu_seqlens), dim)

    def encode(self, texts: Sequence[str], dim: int | None = None) -> np.ndarray:
        """Turn texts into unit vectors, float32 [len(texts), dim].

        Args:
            texts: longer ones are cut to max_tokens; an empty one gives a zero vector.
            dim: keep the first so many numbers of each vector and normalise them again; None keeps all.
        """
        tokens, cu_seqlens = packed(self.tokenizer.encode_texts(list(texts), self.max_tokens))
        return truncate(embed_sequences(self.model, tokens, cu_seqlens, alpha=self.alpha), dim)


def truncate(vectors: np.ndarray, dim: int | None) -> np.ndarray:
    """Matryoshka: the first `dim` numbers of each vector, at unit length again."""
    if dim is None or dim == vectors.shape[1]:
        return vectors
    vectors = vectors[:, :dim]
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
