"""The kernels for Hopper: in a simulator of Gluon against the reference in fp64, with copies and partitions in random
order; on such a GPU the kernels themselves."""

import pytest
import torch
from hopper_cases import LENGTHS, MASKS, SOURCES, assert_as_exact_as_pytorch, backward, forward, needs_hopper, simulated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreted import bf16_as_a_gpu_has_it
from soft_mask_cases import assert_as_exact_as_pytorch as assert_on_the_gpu
from soft_mask_cases import batch, pairwise, results_and_gradients

from conan_kernels import soft_mask_attention, soft_mask_plan
from conan_kernels.attention.hopper import launch
from conan_kernels.attention.reference import soft_mask_attention_reference

ALPHAS = (0, 1e-4, 0.3, 0.7, 1)
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def bf16_products(monkeypatch):
    bf16_as_a_gpu_has_it(monkeypatch)


@simulated
@pytest.mark.parametrize(
    ("D", "dtype", "mask", "alpha", "lengths", "ratio"),
    pairwise(launch.DIMS, (torch.bfloat16, torch.float16), MASKS, ALPHAS, LENGTHS, (1, 3)),
    ids=str,
)
def test_as_exact_as_pytorch(D, dtype, mask, alpha, lengths, ratio):
    assert_as_exact_as_pytorch(batch(lengths, 2 * ratio, 2, D, dtype), alpha, mask)


@simulated
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=4), st.floats(0, 1), st.sampled_from(MASKS), st.integers(1, 9)
)
def test_any_lengths_any_alpha_and_any_number_of_programs(lengths, alpha, mask, programs):
    if sum(lengths):
        assert_as_exact_as_pytorch(batch(lengths, 2, 1, 64, torch.float16), alpha, mask, programs)


def all_results(arguments, alpha, mask="column", **options):
    """out, lse, dq, dk, dv."""
    q, k, v, dout, cu_seqlens = (arguments[name] for name in ("q", "k", "v", "dout", "cu_seqlens"))
    out, lse = forward(q, k, v, cu_seqlens, alpha, mask, **options)
    return out, lse, *backward(q, k, v, dout, cu_seqlens, alpha, out, lse, mask, **options)


@simulated
@pytest.mark.parametrize("mask", ["column", "row"])
def test_the_heads_of_a_packed_projection_and_the_order_of_programs_change_no_bit(mask):
    arguments = batch([150, 3, 260], 2, 2, 112, torch.bfloat16)
    expected = all_results(arguments, 0.4, mask, programs=1)
    qkv = torch.cat([arguments[name] for name in ("q", "k", "v")], dim=1)
    assert not qkv[:, :2].is_contiguous()
    for programs in (2, 7, 64):
        found = all_results(arguments | dict(zip(("q", "k", "v"), qkv.split(2, dim=1))), 0.4, mask, programs=programs)
        assert all(torch.equal(*pair) for pair in zip(found, expected))


@simulated
@pytest.mark.parametrize("mask", MASKS)
def test_what_a_neighbour_holds_does_not_matter(mask):
    """A tile that runs past its sequence would multiply the next one's numbers by 0, and 0 * inf is NaN."""
    arguments = batch([70, 70], 2, 1, 64, torch.float16)
    out, lse, *expected = all_results(arguments, 0.5, mask)
    for name in ("q", "k", "v", "dout"):
        arguments[name][70:] = torch.inf
    again, lse_again, *found = all_results(arguments, 0.5, mask)
    assert torch.equal(again[:70], out[:70]) and torch.equal(lse_again[:, :70], lse[:, :70])
    assert all(torch.equal(x[:70], y[:70]) for x, y in zip(found, expected))


ROOM = "mbarrier.wait(empty.index(n % STAGES), n // STAGES & 1 ^ 1)"
PAIR = "mbarrier.wait(full.index(n % STAGES), n // STAGES & 1)"
HAZARD = "memory|arrivals|never comes"  # chance says which comes first
WRONG = {  # a file, what stands there, what instead, and what the simulator says
    "no room": ("blocks.py", ROOM, "pass", HAZARD),
    "elsewhere": ("blocks.py", "LIMIT - length + position", "LIMIT - length - 9999 + position", "from or to outside"),
    "one arrival": ("blocks.py", "count=ARRIVALS)", "count=1)", HAZARD),
    "half a block": ("blocks.py", "range(2):\n        limit", "range(1):\n        limit", HAZARD),
    "a part less": ("blocks.py", "range(1, len(a))", "range(1, len(a) - 1)", "that nothing waited for"),
    "other columns": ("blocks.py", "slice(64 + (D", "slice(32 + (D", "are not close"),
    "none left": (
        "blocks.py",
        "    tma.store_wait(0)\n    mbarrier",
        "    mbarrier",
        "still being read|reads shared memory",
    ),
    "never freed": ("blocks.py", "pred=turn > 0", "pred=False", "wait for what never comes"),
    "left out, kept": (
        "blocks.py",
        "        mbarrier.arrive(empty.index(n % STAGES))\n        n += 1",
        "        n += 1",
        "wait for what never comes",
    ),
    "values left out": (
        "forward.py",
        "gl.static_range(2):\n            mbarrier.wait",
        "gl.static_range(1):\n            mbarrier.wait",
        "wait for what never comes",
    ),
    "rows left out": ("forward.py", "if first_row + CONSUMER * HALF < length:", "if CONSUMER == 0:", "are not close"),
    "no values": (
        "forward.py",
        "mbarrier.wait(values[1].index(n % STAGES), n // STAGES & 1)",
        "pass",
        "a copy is filling|without a wait for its barrier",
    ),
    "no logits": ("forward.py", "wait(1, deps=[s])", "wait(2, deps=[s])", "that nothing waited for"),
    "values kept": (
        "forward.py",
        "mbarrier.arrive(values[2].index((n - 1) % STAGES))\n    OUT",
        "OUT",
        "wait for what never comes",
    ),
    "values left": (
        "forward.py",
        "out, p = warpgroup_mma_wait(0, deps=[out, p])",
        "out = out.sums",
        "still being read",
    ),
    "out left": ("forward.py", "tma.store_wait(0)", "pass", "still being read|still reads shared memory"),
    "a tile twice": ("forward.py", "gl.where(mixed > plain, 0, BLOCK)", "0 * mixed", "are not close"),
    "no bias": ("forward.py", "if FUTURE:\n        s =", "if False:\n        s =", "are not close"),
    "dq: no pair": ("dq.py", PAIR, "pass", HAZARD),
    "dq: no logits": ("dq.py", "wait(number_of_parts(D), ", "wait(number_of_parts(D) + 1, ", "that nothing waited for"),
    "dq: no dp": ("dq.py", "dp = warpgroup_mma_wait(0", "dp = warpgroup_mma_wait(1", "that nothing waited for"),
    "dq: kept": ("dq.py", "    mbarrier.arrive(empty.index(n % STAGES))\n", "", "wait for what never comes"),
    "dq: left": ("dq.py", "tma.store_wait(0)", "pass", "still being read|still reads shared memory"),
    "dq: never closed": ("dq.py", "+ gl.where(past, 0.0, column_bias)", "", "are not close"),
    "dq: a pair less": ("dq.py", "own_row + HALF)", "own_row)", "are not close"),
    "dq: no bias": ("dq.py", "s * scale + column_bias - future", "s * scale - future", "are not close"),
    "dk: no pair": ("dk_dv.py", PAIR, "pass", HAZARD),
    "dk: no logits": (
        "dk_dv.py",
        "wait(number_of_parts(D), ",
        "wait(number_of_parts(D) + 1, ",
        "that nothing waited for",
    ),
    "dk: no dp": ("dk_dv.py", "dp = warpgroup_mma_wait(1", "dp = warpgroup_mma_wait(2", "that nothing waited for"),
    "dk: released": ("dk_dv.py", PAIR, PAIR + "\n    mbarrier.arrive(empty.index(n % STAGES))", HAZARD),
    "dk: left": ("dk_dv.py", "tma.store_wait(0)", "pass", "still being read|still reads shared memory"),
    "dk: rows left out": ("dk_dv.py", "own_column >= length, length", "own_column >= 64, length", "are not close"),
    "dk: no bias": ("dk_dv.py", "s * scale + column_bias[:, None] - log", "s * scale - log", "are not close"),
    "dk: one head": ("dk_dv.py", "row = head * padded", "row = group * padded", "are not close"),
}


@simulated
@pytest.mark.parametrize(
    # those of dk_dv.py, slow, are much like those of dq.py
    "wrong",
    [pytest.param(wrong, marks=[pytest.mark.slow] * wrong.startswith("dk: ")) for wrong in WRONG],
)
def test_a_planted_error_is_found(wrong, tmp_path):
    file, before, after, message = WRONG[wrong]
    source = (SOURCES / file).read_text(encoding="utf-8")
    assert before in source
    (tmp_path / file).write_text(source.replace(before, after), encoding="utf-8")
    short = [50] * 12 if "left out" in wrong else []  # for which the second consumer has no row and no column
    arguments = batch([600, *short], 2, 1, 80, torch.float16)
    alpha = 0 if wrong == "dq: a pair less" else 0.3
    with pytest.raises(AssertionError, match=message):
        found = all_results(arguments, alpha, replaced={file: tmp_path / file})
        expected = results_and_gradients(soft_mask_attention_reference, arguments, alpha)
        for x, y in zip(found, expected.values()):
            torch.testing.assert_close(x, y, atol=5e-3, rtol=5e-3)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(
    ("D", "dtype", "mask", "alpha", "lengths", "ratio"),
    pairwise(
        launch.DIMS, (torch.bfloat16, torch.float16), MASKS, ALPHAS, (*LENGTHS, [2048, 777, 4096], [64] * 300), (1, 4)
    ),
    ids=str,
)
def test_on_the_gpu_as_exact_as_pytorch(D, dtype, mask, alpha, lengths, ratio):
    assert_on_the_gpu(soft_mask_attention, batch(lengths, 2 * ratio, 2, D, dtype), alpha, mask)


@pytest.mark.gpu
@needs_hopper
def test_on_the_gpu_200_runs_give_the_same_bits():
    arguments = batch([3000, 1, 500, 4096], 8, 2, 112, torch.bfloat16)
    run = lambda: results_and_gradients(soft_mask_attention, arguments, 0.3)
    expected = run()
    for _ in range(200):
        found = run()
        assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.gpu
@needs_hopper
def test_on_the_gpu_opcheck():
    arguments = batch([300, 50], 4, 2, 112, torch.bfloat16)
    q, k, v = (arguments[name].requires_grad_() for name in ("q", "k", "v"))
    alpha = torch.tensor(0.3, device="cuda")
    plan = soft_mask_plan(q, arguments["cu_seqlens"], alpha, scale=0.1)
    of_batch = arguments["cu_seqlens"], alpha, plan
    torch.library.opcheck(torch.ops.conan.soft_mask_attention, (q, k, v, *of_batch, "column", 0.1))
