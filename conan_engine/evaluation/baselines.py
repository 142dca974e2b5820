"""An untrained baseline: token counts, projected at random."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from conan_engine.data.tokenizer import AnyTokenizer


class RandomProjection:
    """(1 + log tf) x idf of a run's own tokens, times a Gaussian matrix. Its first `dim` columns serve for `dim`
    numbers.
    """

    def __init__(self, tokenizer: AnyTokenizer, texts: list[str], width: int) -> None:
        """texts: the idf is counted from these."""
        self.tokenizer = tokenizer
        have = np.zeros(tokenizer.vocab_size)
        for ids in tokenizer.encode_batch(texts):
            have[np.unique(np.asarray(ids, np.int64))] += 1
        self.idf = np.log((1 + len(texts)) / (1 + have))
        self.table = torch.randn(tokenizer.vocab_size, width, generator=torch.Generator().manual_seed(0))

    def encode(self, texts: list[str]) -> np.ndarray:
        """Unit vectors float32 [len(texts), width]; zero for an empty text."""
        counted = [
            np.unique(np.asarray(ids, np.int64), return_counts=True) for ids in self.tokenizer.encode_batch(list(texts))
        ]
        ids, counts = (np.concatenate(part) for part in zip(*counted))
        weights = torch.from_numpy((1 + np.log(counts)) * self.idf[ids]).float()
        starts = torch.from_numpy(np.cumsum([0, *(len(of) for of, _ in counted[:-1])]))
        bags = torch.nn.functional.embedding_bag(
            torch.from_numpy(ids), self.table, starts, mode="sum", per_sample_weights=weights
        )
        return torch.nn.functional.normalize(bags, dim=1).numpy()
