"""What needs no training, to compare with: BM25, and tokens counted and projected at random."""

import os

import numpy as np
import torch

from conan_engine.metrics import ranks

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # bm25s computes something with JAX, where there is one, as it is imported: three quarters of a GPU's memory
import bm25s  # noqa: E402

def bm25_scores(queries, documents):
    """Of each query, what BM25 gives all documents (bm25s with its defaults): [M], one query after another; 0 without a common word."""
    index = bm25s.BM25()
    index.index(bm25s.tokenize(documents, show_progress=False), show_progress=False)
    for query in bm25s.tokenize(queries, return_ids=False, show_progress=False):
        known = [word for word in query if word in index.vocab_dict]
        yield index.get_scores(known) if known else np.zeros(len(documents))


def bm25_ranks(search):
    """The ranks that BM25 gives."""
    scores = np.stack(list(bm25_scores(search.queries, search.documents)))
    own = scores[np.arange(len(search.answer)), search.answer]
    return np.where(own > 0, ranks(scores, search.answer), len(search.documents))


class RandomProjection:
    """(1 + log tf) x idf of a run's own tokens, times a Gaussian matrix, whose first `dim` columns are one of `dim`."""

    def __init__(self, tokenizer, texts, width):
        """texts: from which the idf is counted."""
        self.tokenizer = tokenizer
        have = np.zeros(tokenizer.vocab_size)
        for ids in tokenizer.encode_batch(texts):
            have[np.unique(np.asarray(ids, np.int64))] += 1
        self.idf = np.log((1 + len(texts)) / (1 + have))
        self.table = torch.randn(tokenizer.vocab_size, width, generator=torch.Generator().manual_seed(0))

    def encode(self, texts):
        """Unit vectors float32 [len(texts), width]; zero for an empty text."""
        counted = [np.unique(np.asarray(ids, np.int64), return_counts=True) for ids in self.tokenizer.encode_batch(list(texts))]
        ids, counts = (np.concatenate(part) for part in zip(*counted))
        weights = torch.from_numpy((1 + np.log(counts)) * self.idf[ids]).float()
        starts = torch.from_numpy(np.cumsum([0, *(len(of) for of, _ in counted[:-1])]))
        bags = torch.nn.functional.embedding_bag(torch.from_numpy(ids), self.table, starts, mode="sum", per_sample_weights=weights)
        return torch.nn.functional.normalize(bags, dim=1).numpy()
