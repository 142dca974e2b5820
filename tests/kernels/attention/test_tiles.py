"""How many tiles the soft-masked attention's kernels visit, counted in Triton's interpreter: the minimum, for each
alpha."""

from collections import Counter

import pytest
import torch
from soft_mask_cases import batch, count_tiles, results_and_gradients

from conan_kernels import soft_mask_attention
from conan_kernels.architecture import attention_tiles
from conan_kernels.attention.reference import soft_mask_bias
from conan_kernels.attention.tiles import FUTURE, MIXED, PLAIN

H, G = 2, 1
LENGTHS = [0, 200, 1]
pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="counted in Triton's interpreter, which is off where there is a GPU"
    ),
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning:triton"),
]


def tiles_needed(alpha, mask, BM, BN, open_end):
    """Counter of the kinds of the tiles that hold some M_ij > 0: PLAIN where every M_ij is 1, MIXED where there is
    past, else FUTURE. open_end: whether columns past a sequence's end may stand in a PLAIN tile, as they may where they
    are owned and not stored; where they are summed over they must not."""
    needed = Counter()
    for length in LENGTHS:
        M = soft_mask_bias(length, alpha, mask).exp()
        past = torch.ones(length, length, dtype=torch.bool).tril()
        for row in range(0, length, BM):
            for column in range(0, length, BN):
                tile = slice(row, row + BM), slice(column, column + BN)
                if (M[tile] == 1).all() and (open_end or column + BN <= length):
                    needed[PLAIN.value] += H
                elif past[tile].any():
                    needed[MIXED.value] += H
                elif M[tile].any():
                    needed[FUTURE.value] += H
    return needed


@pytest.mark.parametrize("mask", ["column", "row", "uniform"])
@pytest.mark.parametrize("alpha", [0, 1e-4, 0.3, 0.7, 1])
def test_tiles_visited_are_the_minimum(monkeypatch, alpha, mask):
    counts = count_tiles(monkeypatch)
    results_and_gradients(soft_mask_attention, batch(LENGTHS, H, G, 16, torch.float16), alpha, mask)
    for loop, sizes in zip(("attend", "add_dq", "add_dk_dv"), attention_tiles(torch.float16, 16, 90)):
        visited = Counter({kind: number for (of, kind), number in counts.items() if of == loop})
        needed = tiles_needed(alpha, mask, sizes["BM"], sizes["BN"], open_end=loop == "add_dk_dv")
        assert visited.total() == needed.total() > 0, loop
        # there a program owns columns, and saturated rows keep their bias of 0
        if not (loop == "add_dk_dv" and mask == "row"):
            assert visited == needed, loop


def test_alpha_0_visits_the_causal_half_and_alpha_1_needs_no_bias():
    sizes = dict(BM=16, BN=16, open_end=True)
    causal, half, full = (tiles_needed(alpha, "column", **sizes) for alpha in (0, 0.5, 1))
    blocks = [-(-length // 16) for length in LENGTHS]
    assert causal.total() == H * sum(n * (n + 1) // 2 for n in blocks) and full.total() == H * sum(
        n * n for n in blocks
    )
    assert causal[FUTURE.value] == 0 and full[PLAIN.value] == full.total()
    assert causal[PLAIN.value] < half[PLAIN.value] < full[PLAIN.value]
