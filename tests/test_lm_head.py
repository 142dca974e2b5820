"""The chunked LM head against softmax cross entropy over the whole logits in fp64."""

import pytest
import torch
import torch.nn.functional as F

import conan_engine.lm_head
from conan_engine.lm_head import linear_cross_entropy


def case(T=50, C=24, V=301, dtype=torch.float32):
    targets = torch.randint(V, (T,))
    targets[torch.rand(T) < 0.3] = -100
    return torch.randn(T, C, dtype=dtype).requires_grad_(), torch.randn(V, C).requires_grad_(), targets


@pytest.mark.parametrize("chunk_logits", [1, 301 * 7, 1 << 25])
def test_equals_cross_entropy_of_the_whole_logits(monkeypatch, chunk_logits):
    monkeypatch.setattr(conan_engine.lm_head, "CHUNK_LOGITS", chunk_logits)
    hidden, weight, targets = case()
    loss, count = linear_cross_entropy(hidden, weight, targets)
    found = loss, *torch.autograd.grad(loss / count, (hidden, weight))
    loss = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
    expected = loss, *torch.autograd.grad(loss / count, (hidden, weight))
    assert count == (targets != -100).sum()
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-6)


def test_bf16_hidden_and_fp32_weight():
    hidden, weight, targets = case(dtype=torch.bfloat16)
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    found = torch.autograd.grad(loss, (hidden, weight))
    exact = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
    assert (found[0].dtype, found[1].dtype, loss.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert abs(loss - exact) < 1e-2 * exact
    for a, b in zip(found, torch.autograd.grad(exact, (hidden, weight))):
        assert (a - b).norm() < 0.02 * b.norm()


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
    loss, _ = linear_cross_entropy(hidden * 1e4, weight, targets)
    loss.backward()
    torch.testing.assert_close(loss.double(), F.cross_entropy(hidden.double() * 1e4 @ weight.double().T, targets, reduction="sum"), rtol=1e-5, atol=0)  # fmt: skip
    assert hidden.grad.isfinite().all()


def test_memory_never_holds_the_logits(monkeypatch):
    monkeypatch.setattr(conan_engine.lm_head, "CHUNK_LOGITS", 3010)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor))])
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
