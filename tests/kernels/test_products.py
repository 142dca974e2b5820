"""Products that add up in fp32, against fp64."""

import pytest
import torch
from rounding import assert_within

from conan_kernels.products import add_product_

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [False, True])
def test_adds_a_product(device, dtype, first):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; torch sees none")
    a, b = torch.randn(37, 129, device=device).to(dtype), torch.randn(129, 50, device=device).to(dtype)
    total = torch.full((50, 50), torch.nan, device=device)[:37] if first else torch.randn(37, 50, device=device)
    begun = 0 if first else total.double()
    exact = begun + a.double() @ b.double()
    # on a GPU nothing is rounded to bfloat16 on the way
    plain = begun + ((a @ b) if device == "cpu" else a.float() @ b.float()).double()
    size = a.double().abs() @ b.double().abs()
    eps = torch.finfo(torch.float32).eps
    bound = 129**0.5 * eps * size + 2 * eps * exact.abs()
    if device == "cpu":
        bound += torch.finfo(dtype).eps * (a.double() @ b.double()).abs()
    add_product_(total, a, b, first)
    assert_within("total", total, plain, exact, bound)


@pytest.mark.parametrize("transposed", [False, True])
def test_any_strides(transposed):
    a, b = torch.randn(20, 30), torch.randn(20, 12)
    total = torch.zeros(30, 24)[:, :12] if transposed else torch.zeros(30, 12)
    add_product_(total, a.T, b)
    torch.testing.assert_close(total, a.T @ b)
