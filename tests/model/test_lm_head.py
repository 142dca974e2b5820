"""The chunked LM head against softmax cross entropy over the whole logits in fp64."""

import sys

import pytest
import torch
import torch.nn.functional as F
from interpreted import bf16_as_a_gpu_has_it
from rounding import assert_within

import conan_engine.model.lm_head
from conan_engine.model.lm_head import linear_cross_entropy


def case(T=50, C=24, V=301, dtype=torch.float32):
    targets = torch.randint(V, (T,))
    targets[torch.rand(T) < 0.3] = -100
    return torch.randn(T, C, dtype=dtype).requires_grad_(), torch.randn(V, C).requires_grad_(), targets


def obvious(hidden, weight, targets):
    """Loss and gradients from the whole logits, in the arguments' dtype."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    loss = F.cross_entropy(
        (leaves[0] @ leaves[1].to(hidden.dtype).T).float()
        if hidden.dtype != torch.float64
        else leaves[0] @ leaves[1].T,
        targets,
        reduction="sum",
    )
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def rounding_bounds(hidden, weight, targets):
    """For loss, dhidden and dweight, in the manner of tests/kernels/rounding.py. With S the logits and p their softmax,
    the exponent errs by e = eps (sqrt(C) |x| . |w| + 2 max|S| + 4), p by p (e + sum p e + sqrt(V) eps), to which comes
    rounding to hidden's dtype."""
    (T, C), V = hidden.shape, len(weight)
    eps, h = torch.finfo(torch.float32).eps, torch.finfo(hidden.dtype).eps
    h = 0.0 if h == eps else h
    x, w = hidden.detach().double(), weight.detach().double()
    counted = targets != -100
    S = x @ w.T
    e = C**0.5 * eps * x.abs() @ w.abs().T + (2 * eps + h) * S.abs().amax(1, keepdim=True) + 4 * eps
    p = S.softmax(1)
    of_row = (p * e).sum(1, keepdim=True) + V**0.5 * eps
    target = F.one_hot(targets.clamp(min=0), V)
    of_loss = (of_row[:, 0] + (e * target).sum(1) + eps * S.logsumexp(1).abs())[counted]
    u = (p - target) * counted[:, None]
    of_u = p * (e + of_row) * counted[:, None] + (h + V**0.5 * eps + T**0.5 * eps) * u.abs()
    rounded = (h * (u @ w).abs(), h * (u.T @ x).abs())
    return (
        of_loss.sum() + T**0.5 * eps * of_loss.numel() * S.logsumexp(1).abs().max(),
        of_u @ w.abs() + rounded[0],
        of_u.T @ x.abs() + rounded[1],
    )


def assert_as_exact_as_pytorch(hidden, weight, targets):
    loss, count = linear_cross_entropy(hidden, weight, targets)
    assert count == (targets != -100).sum()
    found = loss.detach(), *torch.autograd.grad(loss, (hidden, weight))
    exact = obvious(hidden.double(), weight.double(), targets)
    for name, *x in zip(
        ("loss", "dhidden", "dweight"),
        found,
        obvious(hidden, weight, targets),
        exact,
        rounding_bounds(hidden, weight, targets),
    ):
        assert_within(name, *x)


@pytest.mark.parametrize("chunk_logits", [1, 301 * 7, 1 << 25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_cross_entropy_of_the_whole_logits(monkeypatch, chunk_logits, dtype):
    monkeypatch.setattr(conan_engine.model.lm_head, "CHUNK_LOGITS", {"cpu": chunk_logits})
    assert_as_exact_as_pytorch(*case(dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_the_kernels_too(monkeypatch, dtype):
    """On a GPU where there is one, else in Triton's interpreter."""
    bf16_as_a_gpu_has_it(monkeypatch)
    monkeypatch.setattr(conan_engine.model.lm_head, "CHUNK_LOGITS", dict.fromkeys(("cpu", "cuda"), 301 * 7))
    monkeypatch.setattr(conan_engine.model.lm_head, "_plain", conan_engine.model.lm_head._fused)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, weight, targets = case(dtype=dtype)
    assert_as_exact_as_pytorch(*(x.detach().to(device).requires_grad_() for x in (hidden, weight)), targets.to(device))


def test_a_planted_error_is_found(monkeypatch):
    hidden, weight, targets = case()
    monkeypatch.setattr(
        sys.modules[__name__],
        "linear_cross_entropy",
        lambda x, w, t, right=linear_cross_entropy: right(x * (1 + 1e-4), w, t),
    )
    with pytest.raises(AssertionError, match="error .* allowed"):
        assert_as_exact_as_pytorch(hidden, weight, targets)


def test_gradients_have_the_dtype_of_what_they_are_of():
    hidden, weight, targets = case(dtype=torch.bfloat16)
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    assert [x.dtype for x in (loss, *torch.autograd.grad(loss, (hidden, weight)))] == [
        torch.float32,
        torch.bfloat16,
        torch.float32,
    ]


def test_no_token_counts():
    hidden, weight, targets = case()
    loss, count = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss == 0 and count == 0 and not hidden.grad.any() and not weight.grad.any()


def test_a_second_backward_is_refused():
    hidden, weight, targets = case()
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward a forward"):
        loss.backward()


def test_large_logits_do_not_overflow():
    hidden, weight, targets = case()
    assert_as_exact_as_pytorch((hidden * 1e4).detach().requires_grad_(), weight, targets)


def test_memory_never_holds_the_logits(monkeypatch):
    monkeypatch.setattr(conan_engine.model.lm_head, "CHUNK_LOGITS", {"cpu": 3010})
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max(
                [largest, *(x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor))]
            )
            return result

    hidden, weight, targets = case(T=1000)
    with Watch():
        linear_cross_entropy(hidden, weight, targets)[0].backward()
    assert largest == hidden.numel()  # 24,000; the logits would be 301,000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(5, 4), torch.randn(9, 3), torch.zeros(5).long()), r"expected, got \[5, 4\], \[9, 3\] and \[5\]"),
        ((torch.randn(5, 4), torch.randn(9, 4), torch.zeros(6).long()), r"expected, got \[5, 4\], \[9, 4\] and \[6\]"),
        ((torch.randn(5, 4), torch.randn(9, 4), torch.full((5,), 9)), r"targets in 0..8 expected, got 9..9"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*arguments)
