"""How a new token table starts: from the spelling of each token and its rarity.

A random vector for each token tells every token from every other, so words that training never saw still match
themselves. Two ideas are added. Tokens that are spelled alike start alike (character n-grams, as in fastText, arXiv
1607.04606). A token's weight in the mean grows with its rarity (as in SIF, ICLR 2017, openreview SyK00v5xx). Both are
numbers among the weights and are trained like any others; the model stays an ordinary Llama.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from conan_engine.model.transformer import STD

if TYPE_CHECKING:
    from torch import Tensor

    from conan_engine.config import Config
    from conan_engine.data.shards import Shards
    from conan_engine.model.transformer import Transformer


NGRAMS = range(3, 6)  # characters
SHARED = 0.7  # length of the part that a token shares with others; its own part has length 1
COLUMNS = 64  # columns of the table that are made at a time
RECORDS, TOKENS = 100_000, 512  # at most so many records of a source, and tokens of a text, are counted
AT_ONCE = 4096  # records counted at a time
# a token in a smaller share of the texts than RAREST weighs 1, the most frequent one LEAST
RAREST, LEAST = 1e-5, 0.02


def start(model: Transformer, tokenizer: Any, shards: Iterable[Shards], config: Config) -> None:
    """Start a new model's token table as config.token_vectors and config.token_weights say.

    shards: the Shards that it will be trained on. Every rank computes the whole table and keeps its part.
    """
    table, group, size = model.embedding, model.tensor.group, tokenizer.vocab_size
    with torch.no_grad():
        if config.token_vectors == "spelling":
            whole = torch.full((table.split_by.sections[0], table.shape[1]), torch.nan)
            whole[:size] = spelled(token_texts(tokenizer), table.shape[1], config.seed) * STD
            mine = table.split_by.cut(whole, group).to(table)
            table.copy_(torch.where(mine.isnan(), table, mine))  # rows without a token stay random
        if config.token_weights == "rarity":
            whole = torch.ones(table.split_by.sections[0])
            whole[:size] = rarity(shards, size)
            weigh(model, table.split_by.cut(whole, group).to(table))


def weigh(model: Transformer, weights: Tensor) -> None:
    """Give token t the share weights[t], in (0, 1], of its usual length in the mean.

    The last column of the table takes the rest of the norm, which RMSNorm keeps constant, and the last norm leaves that
    column out. weights [V].
    """
    table = model.embedding
    table[:, -1] = 0
    table[:, -1] = table.norm(dim=1) * (weights**-2 - 1).sqrt()
    model.norm[-1] = 0


def token_texts(tokenizer: Any) -> list[str]:
    """The text of each token [V], lower case, without surrounding space; "" if it stands for a part of a character."""
    texts = (tokenizer.decode([i]).strip().lower() for i in range(tokenizer.vocab_size))
    return ["" if "\ufffd" in text else text for text in texts]  # part of a character


def spelled(texts: list[str], width: int, seed: int) -> Tensor:
    """Random vectors of root mean square 1, float32 [V, C], that are alike for texts that share character n-grams.

    The same text gives the same vector. The fewer texts share an n-gram, the more alike it makes them. Any two other
    texts are nearly orthogonal. An empty text gets a vector of its own.
    """
    words = dict.fromkeys(filter(None, texts))
    grams = {word: _ngrams(word) for word in words}
    have = Counter(gram for of_word in grams.values() for gram in of_word)
    number = {}  # word, token without a word, or n-gram -> its row of random numbers
    rows, lengths, bags = [], [], []
    for i, text in enumerate(texts):
        shared = sorted(gram for gram in grams.get(text, ()) if have[gram] > 1)
        rarity = np.log(len(words) / np.array([have[gram] for gram in shared]))
        bags.append(len(rows))
        rows += [number.setdefault(key, len(number)) for key in ((text or i,), *shared)]
        lengths += [1.0, *(SHARED * rarity / max(np.linalg.norm(rarity), 1e-12))]
    of_bags = torch.tensor(rows), torch.tensor(bags), torch.tensor(lengths, dtype=torch.float32)
    generator, vectors = torch.Generator().manual_seed(seed), torch.empty(len(texts), width)
    for columns in vectors.split(COLUMNS, dim=1):
        chance = torch.randn(len(number), columns.shape[1], generator=generator)
        columns.copy_(F.embedding_bag(of_bags[0], chance, of_bags[1], mode="sum", per_sample_weights=of_bags[2]))
    return F.normalize(vectors, dim=1) * width**0.5


def _ngrams(word):
    word = f"<{word}>"
    return {word[i : i + n] for n in NGRAMS for i in range(len(word) - n + 1)} - {word}


def rarity(shards: Iterable[Shards], vocab_size: int) -> Tensor:
    """The weight of each token, from LEAST to 1, float32 [V].

    It falls with the logarithm of the share of texts that have the token, in the source where that share is largest.
    """
    share = np.full(vocab_size, RAREST)
    for source in shards:
        texts, have = 0, np.zeros(vocab_size, np.int64)
        sample = np.arange(0, len(source), max(1, -(-len(source) // RECORDS)))
        for first in range(0, len(sample), AT_ONCE):
            tokens, cu_seqlens = source.gather_records(sample[first : first + AT_ONCE], TOKENS)
            lengths = np.diff(cu_seqlens)
            text = np.repeat(np.arange(len(lengths)), lengths)
            have += np.bincount(np.unique(text * np.int64(vocab_size) + tokens) % vocab_size, minlength=vocab_size)
            texts += np.count_nonzero(lengths)
        share = np.maximum(share, have / max(1, texts))
    return torch.from_numpy(np.clip(np.log(share) / np.log(RAREST), LEAST, 1)).float()
