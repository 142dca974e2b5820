"""The products of a CPU: as torch's in float64, with gradients, for any number of threads the same bits."""

import pytest
import torch

from conan_engine.parallel import cpu_linear
from conan_engine.parallel.cpu_linear import Linear

needs_onednn = pytest.mark.skipif(not cpu_linear.available(), reason="this torch has no oneDNN")
SHAPES = [((1,), 16, 8), ((7,), 33, 65), ((2, 5), 12, 20), ((cpu_linear.ROWS + 3,), 64, 48)]


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_product_and_gradients(rows, inputs, outputs):
    linear = Linear(inputs, outputs)
    x = torch.randn(*rows, inputs, requires_grad=True)
    gradient = torch.randn(*rows, outputs)
    out = linear(x)
    out.backward(gradient)
    exact, weight = x.detach().double(), linear.weight.detach().double()
    flat, of_out = exact.flatten(0, -2), gradient.double().flatten(0, -2)
    for found, expected, size in (
        (out.detach(), exact @ weight.T, exact.abs() @ weight.abs().T),
        (x.grad, gradient.double() @ weight, gradient.double().abs() @ weight.abs()),
        (linear.weight.grad, of_out.T @ flat, of_out.abs().T @ flat.abs()),
    ):
        # each product and sum rounds once, so the error is at most eps times the terms' sizes, times their number
        terms = max(inputs, outputs, len(flat))
        assert ((found - expected).abs() <= torch.finfo(torch.float32).eps * terms * size + 1e-30).all()


@needs_onednn
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_the_bits_do_not_depend_on_threads(rows, inputs, outputs):
    linear, x, before = Linear(inputs, outputs), torch.randn(*rows, inputs), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(linear(x).detach())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_onednn
def test_what_onednn_is_not_for_is_torchs():
    linear = Linear(8, 6)
    assert linear(torch.randn(0, 8)).shape == (0, 6)
    assert linear(torch.randn(3, 8)).grad_fn.name() == "_ProductBackward"
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(3, 8)).dtype == torch.bfloat16
    assert linear.double()(torch.randn(3, 8, dtype=torch.float64)).dtype == torch.float64


@needs_onednn
def test_only_asked_gradients_are_computed():
    linear, x = Linear(8, 6), torch.randn(3, 8)
    linear.weight.requires_grad_(False)
    assert not linear(x).requires_grad
    linear(x.requires_grad_()).sum().backward()
    assert x.grad is not None and linear.weight.grad is None
