"""The forward kernel for Hopper: in a simulator of Gluon against the reference in fp64, with copies and partitions in
random order; what it takes beside the plan; on such a GPU the kernel itself."""

import random
from pathlib import Path

import gluon_simulator
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreted import bf16_as_a_gpu_has_it
from rounding import assert_within
from soft_mask_cases import batch, pairwise, results_and_gradients, rounding_bounds

from conan_kernels import soft_mask_attention
from conan_kernels.attention import hopper_launch
from conan_kernels.attention.launch import _plan
from conan_kernels.attention.reference import soft_mask_attention_reference
from conan_kernels.attention.schedule import BLOCK

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
SOURCE = Path(hopper_launch.__file__).with_name("hopper.py")
MASKS = ("column", "row", "uniform")
LENGTHS = ([300], [0, 200, 1, 128], [257, 64, 65], [127, 129], [1])
simulated = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU the kernel itself runs")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def bf16_products(monkeypatch):
    bf16_as_a_gpu_has_it(monkeypatch)


def simulate(q, k, v, cu_seqlens, alpha, mask, scale=None, programs=3, kernel=None):
    """soft_mask_attention's out and lse by the simulated kernel, whose every number is NaN before."""
    kernel = kernel or gluon_simulator.simulated(SOURCE).forward_blocks
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    plan, bias = _plan(cu_seqlens, torch.tensor(float(alpha)), len(q), mask, BLOCK)
    order, pieces = hopper_launch.order_and_pieces(q, plan, bias, mask, scale)
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    lse = torch.full((q.shape[1], len(q)), torch.nan)
    with gluon_simulator.in_place_of_gluon():
        arguments = hopper_launch.arguments(q, k, v, out, lse, plan, order, pieces, bias, mask, scale)
    gluon_simulator.launch(kernel, programs, arguments, seed=random.getrandbits(30))
    return out, lse


def assert_as_exact_as_pytorch(form, arguments, alpha, mask):
    """out and lse against fp64, as soft_mask_cases.assert_as_exact_as_pytorch; the backward kernels are others."""
    exact = results_and_gradients(soft_mask_attention_reference, arguments, alpha, mask, dtype=torch.float64)
    plain = results_and_gradients(soft_mask_attention_reference, arguments, alpha, mask)
    bounds = rounding_bounds(arguments, alpha, mask, None)
    q, k, v, cu_seqlens = (arguments[name] for name in ("q", "k", "v", "cu_seqlens"))
    for name, found in zip(("out", "lse"), form(q, k, v, cu_seqlens, alpha, mask)):
        assert found.shape == exact[name].shape and found.dtype == plain[name].dtype, name
        assert_within(name, found, plain[name], exact[name], bounds[name])


@simulated
@pytest.mark.parametrize(
    ("D", "dtype", "mask", "alpha", "lengths", "ratio"),
    pairwise(hopper_launch.DIMS, (torch.bfloat16, torch.float16), MASKS, (0, 1e-4, 0.3, 0.7, 1), LENGTHS, (1, 3)),
    ids=str,
)
def test_as_exact_as_pytorch(D, dtype, mask, alpha, lengths, ratio):
    assert_as_exact_as_pytorch(simulate, batch(lengths, 2 * ratio, 2, D, dtype), alpha, mask)


@simulated
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=4), st.floats(0, 1), st.sampled_from(MASKS), st.integers(1, 9)
)
def test_any_lengths_any_alpha_and_any_number_of_programs(lengths, alpha, mask, programs):
    if sum(lengths):
        arguments = batch(lengths, 2, 1, 64, torch.float16)
        assert_as_exact_as_pytorch(lambda *given: simulate(*given, programs=programs), arguments, alpha, mask)


@simulated
def test_the_heads_of_a_packed_projection_and_the_order_of_programs_change_no_bit():
    arguments = batch([150, 3, 260], 4, 4, 112, torch.bfloat16)
    q, k, v, cu_seqlens = (arguments[name] for name in ("q", "k", "v", "cu_seqlens"))
    expected = simulate(q, k, v, cu_seqlens, 0.4, "column", programs=1)
    qkv = torch.cat((q, k, v), dim=1)
    assert not qkv[:, :4].is_contiguous()
    for programs in (2, 7, 64):
        found = simulate(*qkv.split(4, dim=1), cu_seqlens, 0.4, "column", programs=programs)
        assert all(torch.equal(*pair) for pair in zip(found, expected))


@simulated
def test_what_a_neighbour_holds_does_not_matter():
    """A tile that runs past its sequence would multiply the next one's numbers by 0, and 0 * inf is NaN."""
    arguments = batch([70, 70], 2, 1, 64, torch.float16)
    q, k, v, cu_seqlens = (arguments[name] for name in ("q", "k", "v", "cu_seqlens"))
    expected = simulate(q, k, v, cu_seqlens, 0.5, "column")
    for x in (q, k, v):
        x[70:] = torch.inf
    found = simulate(q, k, v, cu_seqlens, 0.5, "column")
    assert torch.equal(found[0][:70], expected[0][:70]) and torch.equal(found[1][:, :70], expected[1][:, :70])


WRONG = {  # a line of the kernel, what stands there instead, and what the simulator says
    "no room": ("mbarrier.wait(empty.index(n % STAGES), n // STAGES & 1 ^ 1)", "pass", "memory|arrivals|never comes"),
    "no values": (
        "mbarrier.wait(values[1].index(n % STAGES), n // STAGES & 1)",
        "pass",
        "a copy is filling|without a wait for its barrier",
    ),
    "no logits": ("wait(1, deps=[s])", "wait(2, deps=[s])", "that nothing waited for"),
    "values kept": ("mbarrier.arrive(values[2].index((n - 1) % STAGES))\n    OUT", "OUT", "wait for what never comes"),
    "values left": ("out, p = warpgroup_mma_wait(0, deps=[out, p])", "out = out.sums", "still being read"),
    "out left": ("tma.store_wait(0)", "pass", "still being read|still reads shared memory"),
    "elsewhere": ("LIMIT - length + position", "LIMIT - length - 9999 + position", "from or to outside"),
    "one arrival": (
        "(made.index(number), count=ARRIVALS)",
        "(made.index(number), count=1)",
        "memory|arrivals|never comes",
    ),
    "a tile twice": ("first, gl.where(mixed > plain, 0, BLOCK), plain", "first, 0, plain", "are not close"),
    "no bias": ("if FUTURE:\n        s =", "if False:\n        s =", "are not close"),
}


@simulated
@pytest.mark.parametrize("wrong", WRONG)
def test_a_planted_error_is_found(wrong, tmp_path):
    before, after, message = WRONG[wrong]
    source = SOURCE.read_text(encoding="utf-8")
    assert before in source
    (tmp_path / "wrong.py").write_text(source.replace(before, after), encoding="utf-8")
    kernel = gluon_simulator.simulated(tmp_path / "wrong.py").forward_blocks
    arguments = batch([900], 2, 1, 64, torch.float16)
    with pytest.raises(AssertionError, match=message):
        found, _ = simulate(*(arguments[name] for name in ("q", "k", "v", "cu_seqlens")), 0.3, "column", kernel=kernel)
        expected = soft_mask_attention_reference(*(arguments[name] for name in ("q", "k", "v", "cu_seqlens")), 0.3)
        torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-3)


@simulated
@pytest.mark.parametrize("mask", MASKS)
def test_the_order_has_every_slot_once_those_with_most_tiles_first(mask):
    lengths = torch.randint(0, 600, (80,)).tolist()
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)
    alpha = random.random()
    plan, bias = _plan(cu_seqlens, torch.tensor(alpha), sum(lengths), mask, BLOCK)
    order, _ = hopper_launch.order_and_pieces(torch.empty(1, 1, 64, dtype=torch.bfloat16), plan, bias, mask, 1.0)
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
    plan, bias = _plan(cu_seqlens, torch.tensor(alpha), 633, "column", BLOCK)
    q = torch.empty(1, 1, 64, dtype=dtype)
    _, pieces = hopper_launch.order_and_pieces(q, plan, bias, "column", scale)
    exact = bias.double() / (scale * hopper_launch.LOG2_E.value)
    for start, length in zip(cu_seqlens.tolist(), lengths):
        first = start // BLOCK + cu_seqlens.tolist().index(start)  # the sequence's first slot
        own = pieces[first * BLOCK :][: -(-length // BLOCK) * BLOCK].double()
        assert (own[:, 3:] == 0).all() and (own[length:, 0] == -torch.inf).all() and (own[length:, 1:] == 0).all()
        error = (own[:length].sum(1) - exact[start : start + length]).abs()
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert (error <= exact[start : start + length].abs() * 2.0**-23 + smallest).all()


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ((100, torch.bfloat16, 112, True), r"not sm_100, torch\.bfloat16 and 112: the plain kernel runs"),
        ((90, torch.float32, 112, True), r"not sm_90, torch\.float32 and 112"),
        ((90, torch.float16, 48, True), r"a head dim of 64, 80, 96, 112, 128"),
        ((90, torch.float16, 64, False), r"not 2\^31 or more of these"),
    ],
)
def test_where_it_cannot_run_one_line_says_so(given, found):
    hopper_launch._runs.cache_clear()
    with pytest.warns(UserWarning, match=found) as raised:
        assert not hopper_launch._runs(*given)
    assert len(raised) == 1 and "\n" not in str(raised[0].message)
    assert hopper_launch._runs(90, torch.bfloat16, 112, True)


def test_rows_that_tma_cannot_take_are_copied():
    x = torch.randn(6, 3, 64, dtype=torch.float16)
    assert hopper_launch.rows(x) is x and hopper_launch.rows(x[:, 1:]).data_ptr() == x[:, 1:].data_ptr()
    flat = torch.randn(6 * 200, dtype=torch.float16)
    for strides, offset in (((200, 64, 1), 0), ((0, 64, 1), 0), ((192, 64, 1), 1), ((192, 1, 3), 0)):
        view = flat.as_strided((6, 3, 64), strides, offset)
        copied = hopper_launch.rows(view)
        assert torch.equal(copied, view) and copied.is_contiguous() and copied.data_ptr() % 16 == 0
    assert hopper_launch.heads_of_a_token(x[:, 1:]) == 3 and hopper_launch.heads_of_a_token(x[:1]) == 3


needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU; torch sees none")


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(
    ("D", "dtype", "mask", "alpha", "lengths", "ratio"),
    pairwise(
        hopper_launch.DIMS,
        (torch.bfloat16, torch.float16),
        MASKS,
        (0, 1e-4, 0.3, 0.7, 1),
        (*LENGTHS, [2048, 777, 4096], [64] * 300),
        (1, 4),
    ),
    ids=str,
)
def test_on_the_gpu_as_exact_as_pytorch(monkeypatch, D, dtype, mask, alpha, lengths, ratio):
    monkeypatch.setenv("CONAN_HOPPER", "1")
    form = lambda *given: soft_mask_attention(*given, return_lse=True)
    assert_as_exact_as_pytorch(form, batch(lengths, 2 * ratio, 2, D, dtype), alpha, mask)


@pytest.mark.gpu
@needs_hopper
def test_on_the_gpu_200_runs_give_the_same_bits(monkeypatch):
    monkeypatch.setenv("CONAN_HOPPER", "1")
    arguments = batch([3000, 1, 500, 4096], 8, 2, 112, torch.bfloat16)
    given = *(arguments[name] for name in ("q", "k", "v", "cu_seqlens")), 0.3
    expected = soft_mask_attention(*given, return_lse=True)
    for _ in range(200):
        assert all(torch.equal(*pair) for pair in zip(soft_mask_attention(*given, return_lse=True), expected))


@pytest.mark.gpu
@needs_hopper
def test_on_the_gpu_opcheck(monkeypatch):
    monkeypatch.setenv("CONAN_HOPPER", "1")
    arguments = batch([300, 50], 4, 2, 112, torch.bfloat16)
    q, k, v = (arguments[name].requires_grad_() for name in ("q", "k", "v"))
    alpha = torch.tensor(0.3, device="cuda")
    torch.library.opcheck(torch.ops.conan.soft_mask_attention, (q, k, v, arguments["cu_seqlens"], alpha, "column", 0.1))
