"""`embedder`: the vectors of embed_sequences, and the same bits for any number of threads."""

import numpy as np
import torch

from conan_engine.evaluation.encoder import Encoder, embed_sequences, embedder


def test_the_bits_do_not_depend_on_threads(untrained_run):
    model, chance, threads = Encoder.load(untrained_run).model, np.random.default_rng(), torch.get_num_threads()
    lengths = chance.integers(0, 40, 800)  # some empty, several passes
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    tokens = chance.integers(0, 256, cu_seqlens[-1]).astype(np.int32)
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(embedder(model)(tokens, cu_seqlens))
    finally:
        torch.set_num_threads(threads)
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()
    np.testing.assert_allclose(found[0], embed_sequences(model, tokens, cu_seqlens), atol=1e-5)
    assert (found[0][lengths == 0] == 0).all()
