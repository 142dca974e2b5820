import pytest
import torch
import torch.nn.functional as F

from conan_engine.model import cached_rows
from conan_engine.model.swiglu import swiglu


def textbook(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("cached", [cached_rows.CACHED, 1, 100])  # numbers: all rows at once, one at a time, a few
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (37, 24), (5, 3, 6)])
def test_values_and_gradients_are_those_of_the_definition(shape, cached, dtype, monkeypatch):
    monkeypatch.setattr(cached_rows, "CACHED", cached)
    x, gradient = (2 * torch.randn(shape)).to(dtype), torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)

    def run(form, dtype):
        given = x.to(dtype).requires_grad_()
        out = form(given)
        return out, *torch.autograd.grad(out, given, gradient.to(dtype))

    for ours, theirs, exact in zip(run(swiglu, dtype), run(textbook, dtype), run(textbook, torch.float64)):
        assert ours.dtype == dtype and ours.shape == exact.shape
        # of three factors, each at most as large as its input or 1.1
        rounding = 8 * torch.finfo(dtype).eps * (1 + x.double().abs().amax() ** 2 if x.numel() else 1)
        bound = (2 * (theirs - exact).abs()).clamp(min=rounding * (1 + gradient.abs().max() if x.numel() else 1))
        assert ((ours - exact).abs() <= bound).all()
