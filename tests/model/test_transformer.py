"""The transformer and its packed attention, against the obvious forms in float64."""

import pytest
import torch
import torch.nn.functional as F

import conan_kernels
from conan_engine.config import Model
from conan_engine.model import attention
from conan_engine.model.attention import Attention
from conan_engine.model.transformer import Transformer, count_parameters

SMALL = Model(layers=2, width=48, ffn=96, heads=6, kv_heads=2, context=64, rope_theta=1e4)
LENGTHS = [5, 1, 0, 17, 2, 33, 9, 1]


def packed(lengths, vocab=100):
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return torch.randint(vocab, (sum(lengths),)), cu_seqlens


def random_qkv(total, dtype=torch.float64):
    return (
        torch.randn(total, 6, 8, dtype=dtype),
        torch.randn(total, 2, 8, dtype=dtype),
        torch.randn(total, 2, 8, dtype=dtype),
    )


def textbook(q, k, v, cu_seqlens, alpha, mask):
    """softmax(q.k / sqrt(d) + log M), entry by entry as recipe.md writes it."""
    out = torch.empty_like(q)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        length = end - start
        weight = torch.ones(length, length, dtype=q.dtype)
        for i in range(1, length + 1):
            for j in range(i + 1, length + 1):
                divisor = {"column": j, "row": i, "uniform": length}[mask]
                weight[i - 1, j - 1] = min(alpha * length / divisor, 1)
        for head in range(q.shape[1]):
            kv = head // (q.shape[1] // k.shape[1])
            scores = q[start:end, head] @ k[start:end, kv].T / q.shape[2] ** 0.5
            out[start:end, head] = (scores + weight.log()).softmax(-1) @ v[start:end, kv]
    return out


@pytest.mark.parametrize("mask", ["column", "row", "uniform"])
@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.5, 1.0])
def test_packed_attention_is_the_textbook_soft_mask(mask, alpha):
    _, cu_seqlens = packed(LENGTHS)
    q, k, v = random_qkv(sum(LENGTHS))
    expected = textbook(q, k, v, cu_seqlens, alpha, mask)
    torch.testing.assert_close(Attention(cu_seqlens, alpha, mask)(q, k, v), expected, rtol=1e-6, atol=1e-6)


def test_where_the_kernel_runs_the_layers_of_a_batch_share_one_plan(monkeypatch):
    _, cu_seqlens = packed(LENGTHS)
    q, k, v = (torch.randn(sum(LENGTHS), heads, 16) for heads in (4, 2, 2))
    attend = Attention(cu_seqlens, 0.5, "row")
    expected = attend(q, k, v)
    plans, given = [], []
    of_batch, of_layer = conan_kernels.soft_mask_plan, conan_kernels.soft_mask_attention
    monkeypatch.setattr(conan_kernels, "soft_mask_plan", lambda *a: plans.append(of_batch(*a)) or plans[-1])
    monkeypatch.setattr(
        conan_kernels, "soft_mask_attention", lambda *a, plan, **n: given.append(plan) or of_layer(*a, plan=plan, **n)
    )
    attend.runs = None  # as on CUDA
    for _ in range(2):
        torch.testing.assert_close(attend(q, k, v), expected)
    assert len(plans) == 1 and all(plan is plans[0] for plan in given) and len(given) == 2


@pytest.mark.parametrize("mask", ["column", "row", "uniform"])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_a_bias_too_large_to_have_whole_is_made_block_by_block(monkeypatch, alpha, mask):
    _, cu_seqlens = packed([90, 70, 1, 33, 0, 64])
    found = []
    for room in (1 << 28, 4 * 2 * 90 * 16, 1):  # all at once; 16 queries at a time; one
        monkeypatch.setattr(attention, "BIAS_BYTES", room)
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(258, heads, 8, generator=generator).requires_grad_() for heads in (6, 2, 2))
        out = Attention(cu_seqlens, alpha, mask)(q, k, v)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append((out, q.grad, k.grad, v.grad))
    for tensors in zip(*found):
        for block in tensors[1:]:
            torch.testing.assert_close(block, tensors[0], rtol=1e-5, atol=1e-5)


def test_neighbours_of_one_length_share_a_call_on_a_cpu():
    _, cu_seqlens = packed([3, 3, 0, 3, 5, 5, 3])
    assert [run[:2] for run in Attention(cu_seqlens, 1.0).runs] == [(3, 3), (2, 5), (1, 3)]


@pytest.mark.parametrize(("alpha", "causal"), [(0.0, True), (1.0, False)])
def test_alpha_0_is_exactly_causal_and_alpha_1_exactly_bidirectional(alpha, causal):
    """Exactly: what a token may not see does not reach it at all, what it may see reaches it as without a mask."""
    _, cu_seqlens = packed([24])
    q, k, v = random_qkv(24, torch.float32)
    repeated = [x.repeat_interleave(3, dim=1).transpose(0, 1)[None] for x in (k, v)]
    zeros = None if causal else torch.zeros(1, 1, 24, 24)
    expected = F.scaled_dot_product_attention(q.transpose(0, 1)[None], *repeated, is_causal=causal, attn_mask=zeros)
    torch.testing.assert_close(Attention(cu_seqlens, alpha)(q, k, v), expected[0].transpose(0, 1), rtol=0, atol=0)


def test_the_future_reaches_a_token_only_as_alpha_opens():
    tokens, cu_seqlens = packed([20])
    model = Transformer(SMALL, 100).init_weights(0)
    changed = tokens.clone()
    changed[15] = (changed[15] + 1) % 100
    before = {
        alpha: (model(tokens, cu_seqlens, alpha)[:15] - model(changed, cu_seqlens, alpha)[:15]).abs().max()
        for alpha in (0.0, 0.3, 1.0)
    }
    assert before[0.0] == 0 < before[0.3] < before[1.0]


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_packed_equals_one_by_one(pooling, alpha):
    tokens, cu_seqlens = packed(LENGTHS)
    model = Transformer(Model(**{**vars(SMALL), "pooling": pooling}), 100).init_weights(0).double()
    together = model.embed(tokens, cu_seqlens, alpha)
    for i, (start, end) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:])):
        alone = model.embed(tokens[start:end], torch.tensor([0, end - start], dtype=torch.int32), alpha)
        torch.testing.assert_close(together[i], alone[0], rtol=1e-5, atol=1e-6)
    assert together[LENGTHS.index(0)].abs().sum() == 0


def test_gradients_are_those_of_one_by_one():
    tokens, cu_seqlens = packed(LENGTHS)
    model = Transformer(SMALL, 100).init_weights(0)
    weight = torch.randn(len(LENGTHS), 48)
    (model.embed(tokens, cu_seqlens, 0.5) * weight).sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for i, (start, end) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:])):
        (
            model.embed(tokens[start:end], torch.tensor([0, end - start], dtype=torch.int32), 0.5) * weight[i]
        ).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(together[name], p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_blocks_computed_anew_give_the_same_bits_and_hold_less(precision):
    tokens, cu_seqlens = packed(LENGTHS)
    found, held = [], []
    for recompute in ("none", "block"):
        model = Transformer(SMALL, 100, precision, recompute=recompute).init_weights(0)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            loss = model.next_token_loss(tokens, cu_seqlens, tokens.long().roll(-1), 0.5)
            held.append(sum(kept))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*found))
    assert held[1] < 0.5 * held[0]


def test_bfloat16_products_stay_near_those_of_float32():
    tokens, cu_seqlens = packed(LENGTHS)
    weight = torch.randn(len(LENGTHS), 48)
    found = []
    for precision in ("float32", "bfloat16"):
        model = Transformer(SMALL, 100, precision).init_weights(0)
        out = model.embed(tokens, cu_seqlens, 0.5)
        (out * weight).sum().backward()
        assert out.dtype == model.embedding.grad.dtype == torch.float32
        found.append([out.detach(), *(p.grad for p in model.parameters())])
    for exact, rounded in zip(*found):
        assert 0 < (exact - rounded).norm() < 0.02 * exact.norm()


def test_products_are_in_bfloat16_as_set_and_on_a_cpu_not_by_themselves():
    assert [Transformer(SMALL, 100, precision).in_bfloat16() for precision in ("float32", "bfloat16", "auto")] == [
        False,
        True,
        False,
    ]


def test_the_papers_shape_has_1499_million_parameters():
    assert round(count_parameters(Model(), 150_000) / 1e6) == 1499
