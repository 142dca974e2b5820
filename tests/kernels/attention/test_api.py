"""`conan_kernels.soft_mask_attention` against the reference form in fp64: on a GPU where there is one, else in Triton's
interpreter."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreted import bf16_as_a_gpu_has_it
from soft_mask_cases import DEVICE, assert_as_exact_as_pytorch, batch, pairwise, results_and_gradients

from conan_kernels import soft_mask_attention
from conan_kernels.architecture import attention_tiles
from conan_kernels.attention import launch
from conan_kernels.attention.reference import soft_mask_attention_reference, soft_mask_bias

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIMS = (16, 32, 64, 80, 96, 112, 128)
RATIOS = (1, 4, 8)
MASKS = ("column", "row", "uniform")
ALPHAS = (0, 1e-4, 0.3, 0.7, 1)
LENGTHS = ([1], [33], [0, 70, 2], [5, 0, 17])

# log2 0 of a closed future; and in dk_dv the columns past a sequence's end, which are computed and not stored
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def bf16_products(monkeypatch):
    bf16_as_a_gpu_has_it(monkeypatch)


@pytest.mark.parametrize(
    ("dtype", "D", "ratio", "mask", "alpha", "lengths"), pairwise(DTYPES, DIMS, RATIOS, MASKS, ALPHAS, LENGTHS), ids=str
)
def test_as_exact_as_pytorch(dtype, D, ratio, mask, alpha, lengths):
    G = 2 if ratio == 1 else 1
    assert_as_exact_as_pytorch(soft_mask_attention, batch(lengths, G * ratio, G, D, dtype), alpha, mask)


@pytest.fixture
def half_precision_tiles(request, monkeypatch):
    """fp32 in the tiles of bf16: a wrong weight shows, which in bf16 the rounding would hide."""
    sizes = attention_tiles(torch.bfloat16, 16, request.param)
    monkeypatch.setattr(launch, "attention_tiles", lambda *_: sizes)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("half_precision_tiles", [80, 86, 90, 120], indirect=True)
def test_the_large_tiles_of_half_precision_are_exact_too(half_precision_tiles, mask):
    """Two sequences end within a tile, one at its edge."""
    for alpha in (0.3, 0.7):
        assert_as_exact_as_pytorch(soft_mask_attention, batch([150, 3, 128, 0], 1, 1, 16), alpha, mask)


@pytest.mark.parametrize("half_precision_tiles", [80], indirect=True)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 100), min_size=1, max_size=3), st.floats(0, 1), st.sampled_from(MASKS))
def test_any_lengths_and_any_alpha(half_precision_tiles, lengths, alpha, mask):
    assert_as_exact_as_pytorch(soft_mask_attention, batch(lengths, 1, 1, 16), alpha, mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequences_of_the_models_head_dim(dtype):
    lengths = [70] if dtype == torch.float32 else [200, 41]
    assert_as_exact_as_pytorch(soft_mask_attention, batch(lengths, 2, 1, 112, dtype), 0.4)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_weights_are_the_mask_before_and_after_saturation(mask, alpha):
    """Without logits the weights are M itself, a row divided by its sum; one-hot values show them one by one."""
    L, D = 100, 128
    q, v = torch.zeros(L, 1, D, device=DEVICE), torch.eye(L, D, device=DEVICE)[:, None]
    out, lse = soft_mask_attention(
        q, q, v, torch.tensor([0, L], dtype=torch.int32, device=DEVICE), alpha, mask, return_lse=True
    )
    M = soft_mask_bias(L, alpha, mask).exp()
    saturated = (M == 1).triu(1).any(0)  # columns that are open to an earlier row
    if mask == "column" and 0.1 < alpha < 1:
        assert saturated[1 : int(alpha * L)].all() and not saturated[int(alpha * L) + 1 :].any()
    torch.testing.assert_close(out[:, 0, :L].cpu().double(), M / M.sum(1, keepdim=True), rtol=2e-6, atol=1e-8)
    torch.testing.assert_close(lse[0].cpu().double(), M.sum(1).log(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("alpha", "causal"), [(0, True), (1, False)])
@pytest.mark.parametrize("mask", MASKS)
def test_alpha_0_is_causal_and_alpha_1_is_full_attention(alpha, causal, mask):
    arguments = batch([67], 2, 1, 80)

    def sdpa(q, k, v, *_, return_lse):
        heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
        return F.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=True)[0].transpose(0, 1), None

    expected = results_and_gradients(sdpa, arguments)
    found = results_and_gradients(soft_mask_attention, arguments, alpha, mask)
    for name in ("out", "dq", "dk", "dv"):
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_large_logits_do_not_overflow(dtype, alpha):
    arguments = batch([50, 7], 2, 1, 32, dtype)
    logits = torch.einsum("qhd,kgd->hqk", arguments["q"].float(), arguments["k"].float()) * 32**-0.5
    arguments["q"] *= 95 / logits.max()  # exp(89) is infinite in fp32
    for x in results_and_gradients(soft_mask_attention, arguments, alpha).values():
        assert x.isfinite().all()
    assert_as_exact_as_pytorch(soft_mask_attention, arguments, alpha)


def wrong_scale(q, k, v, cu_seqlens, alpha, mask, scale, return_lse):
    return soft_mask_attention(q, k, v, cu_seqlens, alpha, mask, q.shape[2] ** -0.5 * (1 + 1e-4), return_lse)


def wrong_alpha(q, k, v, cu_seqlens, alpha, mask, scale, return_lse):
    return soft_mask_attention(q, k, v, cu_seqlens, alpha + 1e-3, mask, scale, return_lse)


def a_column_left_out(q, k, v, cu_seqlens, alpha, mask, scale, return_lse):
    """All rows but the last lack the last column."""
    whole, shorter = (
        soft_mask_attention(
            q[:n],
            k[:n],
            v[:n],
            cu_seqlens.clamp(max=n),
            alpha * len(q) / n if mask != "uniform" else alpha,
            mask,
            scale,
            True,
        )
        for n in (len(q), len(q) - 1)
    )
    return tuple(
        torch.cat((short, long.narrow(dim, len(q) - 1, 1)), dim) for dim, short, long in zip((0, 1), shorter, whole)
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("wrong", "alpha"),
    [(wrong_scale, 0), (wrong_scale, 0.5), (wrong_alpha, 0), (wrong_alpha, 0.5), (a_column_left_out, 0.5)],
)
def test_a_planted_error_is_found(wrong, alpha, mask):
    with pytest.raises(AssertionError, match="error .* allowed"):
        assert_as_exact_as_pytorch(wrong, batch([70], 2, 1, 112), alpha, mask)
    if wrong == a_column_left_out:
        with pytest.raises(AssertionError, match="error .* allowed"):
            assert_as_exact_as_pytorch(wrong, batch([33], 2, 1, 112, torch.bfloat16), alpha, mask)


def test_scale_is_a_choice():
    assert_as_exact_as_pytorch(soft_mask_attention, batch([40, 3], 2, 1, 48), 0.5, scale=0.7)


def test_no_token_and_no_sequence():
    for lengths in ([], [0], [0, 0, 0]):
        found = results_and_gradients(soft_mask_attention, batch(lengths, 4, 2, 16), 0.5)
        assert [tuple(x.shape) for x in found.values()] == [(0, 4, 16), (4, 0), (0, 4, 16), (0, 2, 16), (0, 2, 16)]


def test_a_packed_batch_gives_the_bits_of_its_sequences_alone():
    whole = batch([37, 1, 0, 64, 20], 2, 1, 16)
    together = results_and_gradients(soft_mask_attention, whole, 0.6)
    for start, end in zip(whole["cu_seqlens"][:-1].tolist(), whole["cu_seqlens"][1:].tolist()):
        one = {name: whole[name][start:end] for name in ("q", "k", "v", "dout")}
        one["cu_seqlens"] = torch.tensor([0, end - start], dtype=torch.int32, device=DEVICE)
        for name, x in results_and_gradients(soft_mask_attention, one, 0.6).items():
            assert torch.equal(x, together[name][:, start:end] if name == "lse" else together[name][start:end]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_inputs_give_the_same_bits(dtype):
    arguments = batch([33, 0, 9], 4, 2, 16, dtype)
    first = results_and_gradients(soft_mask_attention, arguments, 0.3)
    for alpha in (0.3, torch.tensor(0.3, device=DEVICE)):
        for name, x in results_and_gradients(soft_mask_attention, arguments, alpha).items():
            assert torch.equal(x, first[name]), name


def test_the_reference_is_the_formula_entry_by_entry():
    L, scale = 9, 0.3
    q, k, v = torch.randn(3, L, 1, 4, dtype=torch.float64)
    for mask in MASKS:
        out, lse = soft_mask_attention_reference(q, k, v, torch.tensor([0, L]), 0.4, mask, scale, return_lse=True)
        for i in range(1, L + 1):
            M = [
                1 if j <= i else min(0.4 * L / {"column": j, "row": i, "uniform": L}[mask], 1) for j in range(1, L + 1)
            ]
            weights = torch.tensor(
                [M[j] * torch.exp(scale * (q[i - 1] * k[j]).sum()).item() for j in range(L)], dtype=torch.float64
            )
            torch.testing.assert_close(out[i - 1, 0], (weights[:, None] * v[:, 0]).sum(0) / weights.sum())
            torch.testing.assert_close(lse[0, i - 1], weights.sum().log())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "D", "ratio", "mask", "alpha", "lengths"),
    pairwise(
        DTYPES, DIMS, RATIOS, MASKS, ALPHAS, ([2049], [1000, 0, 1, 513, 128], [1] * 300 + [700], list(range(100)))
    ),
    ids=str,
)
def test_larger_as_exact_as_pytorch(dtype, D, ratio, mask, alpha, lengths):
    assert_as_exact_as_pytorch(soft_mask_attention, batch(lengths, 2 * ratio, 2, D, dtype), alpha, mask)


@pytest.mark.gpu
@pytest.mark.parametrize("alpha", ALPHAS)
def test_32768_tokens_as_exact_as_pytorch_at_memory_of_the_tokens(alpha):
    arguments = batch([32768], 1, 1, 112, torch.bfloat16)
    assert_as_exact_as_pytorch(soft_mask_attention, arguments, alpha)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results_and_gradients(soft_mask_attention, arguments, alpha)
    inputs = 4 * 32768 * 112 * 2  # q, k, v, dout
    assert torch.cuda.max_memory_allocated() - before < 3 * inputs


@pytest.mark.gpu
def test_large_same_inputs_give_the_same_bits():
    arguments = batch([4000, 17, 3000], 32, 8, 112, torch.bfloat16)
    first = results_and_gradients(soft_mask_attention, arguments, 0.3)
    for _ in range(10):
        for name, x in results_and_gradients(soft_mask_attention, arguments, 0.3).items():
            assert torch.equal(x, first[name]), name
