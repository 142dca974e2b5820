import pytest
import torch
import torch.nn.functional as F

from conan_engine.model import cached_rows, rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cached", [cached_rows.CACHED, 1, 100])  # numbers: all rows at once, one at a time, a few
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (1, 512), (37, 24), (5, 3, 7)])
def test_values_and_gradients_are_those_of_the_definition(shape, dtype, cached, monkeypatch):
    monkeypatch.setattr(cached_rows, "CACHED", cached)
    x = (
        torch.randn(shape, dtype=dtype)
        * torch.logspace(-3, 3, max(1, shape[0]), dtype=dtype).view(-1, *[1] * (len(shape) - 1))[: shape[0]]
    )
    weight, gradient, eps = torch.randn(shape[-1], dtype=dtype), torch.randn(shape, dtype=dtype), 1e-6

    def run(norm, dtype):
        a, w = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        out = norm(a, w)
        return (out, *torch.autograd.grad(out, (a, w), gradient.to(dtype)))

    ours = run(lambda a, w: rms_norm.add_rms_norm(a, None, w, eps)[1], dtype)
    theirs = run(lambda a, w: F.rms_norm(a, w.shape, w, eps), dtype)
    exact = run(lambda a, w: a * (a.square().mean(-1, keepdim=True) + eps).rsqrt() * w, torch.float64)
    eps_of = torch.finfo(dtype).eps
    for mine, reference, true in zip(ours, theirs, exact):
        assert mine.dtype == dtype and mine.shape == true.shape
        # rows, and the sum over rows that the weight's gradient is, have errors of their own largest numbers
        scale = true.abs().amax(-1, keepdim=True) if true.dim() > 1 else true.abs().max()
        bound = torch.maximum(2 * (reference - true).abs(), 16 * (shape[-1] + len(true)) ** 0.5 * eps_of * scale)
        assert ((mine - true).abs() <= bound).all()


def test_a_weight_of_another_dtype_gets_its_gradient():
    x, weight = torch.randn(3, 8), torch.randn(8, dtype=torch.bfloat16, requires_grad=True)
    out = rms_norm.add_rms_norm(x, None, weight, 1e-6)[1]
    out.sum().backward()
    assert out.dtype == torch.float32 and weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad.float(), F.rms_norm(x, (8,), None, 1e-6).sum(0), rtol=1e-2, atol=1e-2)


def test_a_sum_is_made_before_its_norm():
    x, y, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    total, normed = rms_norm.add_rms_norm(x, y, weight, 1e-6)
    assert torch.equal(total, x + y) and torch.equal(normed, rms_norm.add_rms_norm(x + y, None, weight, 1e-6)[1])
