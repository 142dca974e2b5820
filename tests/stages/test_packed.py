"""Packed sequences stay whole in every piece."""

import numpy as np
import pytest
import torch

from conan_engine.config import Stage
from conan_engine.stages.packed import Packed, concatenate

LENGTHS = [3, 0, 1, 4, 2]


def _packed(lengths):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return Packed(torch.randint(2**31 - 1, (sum(lengths),), dtype=torch.int32), cu_seqlens)


@pytest.mark.parametrize(("rows", "units"), [(None, 5), ([0, 2, 3, 5], 3)])
@pytest.mark.parametrize("chunk", [0, 1, 2, 3, 5, 9])
def test_splitting_keeps_every_sequence_and_every_row_whole(chunk, rows, units):
    cu_seqlens = torch.tensor(np.concatenate(([0], np.cumsum(LENGTHS))), dtype=torch.int32)
    whole = Packed(torch.arange(10), cu_seqlens)
    parts = whole.split(chunk, rows and torch.tensor(rows, dtype=torch.int32))
    assert torch.cat([part.tokens for part in parts]).tolist() == list(range(10))
    assert torch.cat([part.cu_seqlens.diff() for part in parts]).tolist() == LENGTHS
    assert all(part.cu_seqlens[0] == 0 for part in parts)
    firsts = np.cumsum([0, *(len(part.cu_seqlens) - 1 for part in parts)]).tolist()
    assert firsts == (rows or list(range(6)))[:: chunk or units] + ([5] if units % (chunk or units) else [])


def _texts(part):
    return [part.tokens[start:end].tolist() for start, end in zip(part.cu_seqlens, part.cu_seqlens[1:])]


@pytest.mark.parametrize("lengths", [[], [0], [9], [0, 0, 0], LENGTHS, [7] * 9, [30, 1], "random"])
@pytest.mark.parametrize("most", [1, 4, 7, 20, 10**6])
def test_a_budget_of_tokens_keeps_every_text_and_puts_neighbours_in_length_together(lengths, most):
    lengths = torch.randint(60, (50,)).tolist() if lengths == "random" else lengths
    whole = _packed(lengths)
    parts, order = whole.split_by_tokens(most)
    found, texts = [_texts(part) for part in parts], _texts(whole)
    assert all(part.cu_seqlens[0] == 0 and part.cu_seqlens[-1] == len(part.tokens) for part in parts)
    flat = [text for part in found for text in part]
    assert flat == (texts if order is None else [texts[i] for i in order])
    assert all(len(part.tokens) <= most or len(texts) == 1 for part, texts in zip(parts, found))
    if order is None:
        assert len(parts) == 1
        return
    assert [len(text) for text in flat] == sorted(lengths, reverse=True)
    for earlier, part in zip(found, parts[1:]):  # the shortest text before it had no room in it
        assert len(part.tokens) + len(earlier[-1]) > most


@pytest.mark.parametrize("rows", [None, [0, 2, 3, 5]])
@pytest.mark.parametrize("settings", [{}, {"chunk": 2}, {"chunk_tokens": 4}], ids=str)
def test_on_a_cpu_each_piece_is_sorted_by_length(settings, rows):
    whole = _packed(LENGTHS)
    parts, order = whole.cut(Stage(**settings), rows and torch.tensor(rows, dtype=torch.int32))
    found, texts = [_texts(part) for part in parts], _texts(whole)
    assert [text for part in found for text in part] == [texts[i] for i in order]
    for lengths in ([*map(len, part)] for part in found):
        assert lengths in (sorted(lengths), sorted(lengths, reverse=True))


def test_parts_stand_one_after_another():
    first, second = (
        Packed(torch.arange(sum(n)), torch.tensor([0, *np.cumsum(n)], dtype=torch.int32)) for n in ([2, 0, 3], [1, 4])
    )
    whole = concatenate(first, second, first)
    empty = Packed(first.tokens[:0], first.cu_seqlens[:1])
    assert [x.tolist() for x in concatenate(empty, first, empty)] == [x.tolist() for x in first]
    assert whole.tokens.tolist() == [0, 1, 2, 3, 4] * 3 and whole.cu_seqlens.diff().tolist() == [2, 0, 3, 1, 4, 2, 0, 3]
