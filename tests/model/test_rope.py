import pytest
import torch

from conan_engine.config import Model
from conan_engine.model import cached_rows
from conan_engine.model.rope import rotate, turns
from conan_engine.model.transformer import positions


def textbook(x, cos, sin, heads):
    """(x[d] + i x[d + D/2]) e^(i angle), of the first heads; the others as they are."""
    a, b = x.chunk(2, dim=-1)
    turned = torch.complex(a, b) * torch.complex(cos, sin)
    return torch.cat((torch.cat((turned.real, turned.imag), dim=-1)[:, :heads], x[:, heads:]), dim=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("cached", [cached_rows.CACHED, 1, 100])  # numbers: all rows at once, one at a time, a few
@pytest.mark.parametrize(("T", "N", "heads", "D"), [(0, 3, 2, 8), (1, 1, 1, 2), (37, 6, 4, 24), (5, 3, 0, 8)])
def test_values_and_gradients_are_those_of_the_definition(T, N, heads, D, cached, dtype, monkeypatch):
    monkeypatch.setattr(cached_rows, "CACHED", cached)
    wide = torch.promote_types(dtype, torch.float32)
    x, gradient = torch.randn(T, N, D).to(dtype), torch.randn(T, N, D, dtype=wide)
    cos, sin = turns(torch.randint(1000, (T,)), Model(head_dim=D, rope_theta=1e4), wide)
    given = x.requires_grad_()
    out = rotate(given, cos, sin, heads)
    (of_x,) = torch.autograd.grad(out, given, gradient)
    exact = x.detach().double().requires_grad_()
    expected = textbook(exact, cos.double(), sin.double(), heads)
    (of_exact,) = torch.autograd.grad(expected, exact, gradient.double())
    assert (out.dtype, of_x.dtype) == (wide, dtype)
    rounding = torch.finfo(wide).eps
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=16 * rounding)
    torch.testing.assert_close(of_x.double(), of_exact, rtol=torch.finfo(dtype).eps, atol=16 * rounding)
    assert torch.equal(out[:, heads:], x.detach()[:, heads:].to(wide))


def test_it_turns_by_the_distance_within_the_own_sequence():
    cu_seqlens = torch.tensor([0, 7, 19], dtype=torch.int32)
    cos, sin = turns(positions(cu_seqlens, 19), Model(head_dim=8, rope_theta=1e4), torch.float64)
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    turned_q, turned_k = (rotate(x.expand(19, 1, 8), cos, sin, 1)[:, 0] for x in (q, k))
    torch.testing.assert_close(turned_q[5] @ turned_k[2], turned_q[7 + 9] @ turned_k[7 + 6])
    torch.testing.assert_close(turned_q[7], q)  # the second sequence starts at position 0
