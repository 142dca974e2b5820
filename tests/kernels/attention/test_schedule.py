"""What the kernels for Hopper need beside the plan."""

import random

import pytest
import torch
from hopper_cases import MASKS, simulated
from interpreted import bf16_as_a_gpu_has_it
from soft_mask_cases import order_of, pieces_of, plan_of

from conan_kernels.attention.hopper import BLOCK, LOG2_E
from conan_kernels.attention.launch import sums_of_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def bf16_products(monkeypatch):
    bf16_as_a_gpu_has_it(monkeypatch)


@simulated
@pytest.mark.parametrize("mask", MASKS)
def test_the_order_has_every_slot_once_those_with_most_tiles_first(mask):
    lengths = torch.randint(0, 600, (80,)).tolist()
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)
    alpha = random.random()
    plan, bias = plan_of(cu_seqlens, alpha, mask)
    order = order_of(plan, mask)
    working, order = order[0].item(), order[1:]
    assert sorted(order.tolist()) == list(range(len(plan)))
    assert working == sum(-(-length // BLOCK) for length in lengths) == (plan[:, 1] > 0).sum()
    assert (plan[order[:working].long(), 1] > 0).all()
    _, length, first_row, ones = plan[order[:working].long()].T
    visited = torch.where(ones >= 0, length, torch.minimum(first_row + BLOCK, length)).div(BLOCK).ceil()
    assert (visited.diff() <= 0).all()


@simulated
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_three_pieces_of_the_bias_are_the_bias(dtype):
    lengths, alpha, scale = [500, 3, 130], 0.01, 0.1
    cu_seqlens = torch.tensor([0, 500, 503, 633], dtype=torch.int32)
    plan, bias = plan_of(cu_seqlens, alpha, "column")
    _, pieces = pieces_of(plan, bias, dtype, "column", scale)
    exact = bias.double() / (scale * LOG2_E)
    for start, length in zip(cu_seqlens.tolist(), lengths):
        first = start // BLOCK + cu_seqlens.tolist().index(start)  # the sequence's first slot
        own = pieces[first * BLOCK :][: -(-length // BLOCK) * BLOCK].double()
        assert (own[:, 3:] == 0).all() and (own[length:, 0] == -torch.inf).all() and (own[length:, 1:] == 0).all()
        error = (own[:length].sum(1) - exact[start : start + length]).abs()
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert (error <= exact[start : start + length].abs() * 2.0**-23 + smallest).all()


@simulated
@pytest.mark.parametrize("mask", MASKS)
def test_sums_of_rows_and_the_bias_of_columns_lie_in_whole_tiles(mask):
    lengths, H, D, alpha = [500, 0, 3, 130], 3, 80, 0.4
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)
    T = sum(lengths)
    plan, bias = plan_of(cu_seqlens, alpha, mask)
    out, dout = torch.randn(2, T, H, D).half()
    lse = torch.randn(H, T)
    sums = sums_of_rows(out, dout, lse, plan, bias, mask)
    closed, _ = pieces_of(plan, bias, out.dtype, mask, 0.1)
    delta = (out.double() * dout.double()).sum(2).T
    for number, (start, length) in enumerate(zip(cu_seqlens.tolist(), lengths)):
        first = (start // BLOCK + number) * BLOCK
        last, whole, own = first + length, first + -(-length // BLOCK) * BLOCK, slice(start, start + length)
        log_sums, deltas = sums["log_sums"], sums["deltas"]
        torch.testing.assert_close(log_sums[:, first:last], lse[:, own] * LOG2_E)
        torch.testing.assert_close(deltas[:, first:last].double(), delta[:, own], atol=1e-4, rtol=1e-5)
        assert (log_sums[:, last:whole] == torch.inf).all() and (deltas[:, last:whole] == 0).all()
        assert torch.equal(closed[first:last], bias[own] if mask == "column" else torch.zeros(length))
        assert (closed[last:whole] == -torch.inf).all()
        if mask != "column":
            future = sums["future_log_sums"]
            torch.testing.assert_close(future[:, first:last], log_sums[:, first:last] - bias[own])
            assert (future[:, last:whole] == torch.inf).all()
