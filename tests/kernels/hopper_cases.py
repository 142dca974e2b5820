"""The kernels for Hopper in the simulator of Gluon, and the rule by which their results are right."""

import random
from pathlib import Path

import gluon_simulator
import pytest
import torch
from rounding import assert_within
from soft_mask_cases import order_of, pieces_of, plan_of, results_and_gradients, rounding_bounds

from conan_kernels.attention.hopper import launch
from conan_kernels.attention.launch import sums_of_rows
from conan_kernels.attention.reference import soft_mask_attention_reference

SOURCES = Path(launch.__file__).parent
MASKS = ("column", "row", "uniform")
LENGTHS = ([300], [0, 200, 1, 128], [257, 64, 65], [127, 129], [1])
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
simulated = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU the kernels themselves run")
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU; torch sees none")


def kernel(file, name, replaced=None):
    """NAME of hopper/FILE for the simulator; replaced: other files in the place of some of that folder, by name."""
    path = lambda file: (replaced or {}).get(file, SOURCES / file)
    return getattr(gluon_simulator.simulated(path(file), path("blocks.py")), name)


def forward(q, k, v, cu_seqlens, alpha, mask="column", scale=None, programs=3, replaced=None):
    """soft_mask_attention's out and lse by the simulated kernel, whose every number is NaN before."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    plan, bias = plan_of(cu_seqlens, alpha, mask)
    order, of_columns = order_of(plan, mask), pieces_of(plan, bias, q.dtype, mask, scale)
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    lse = torch.full((q.shape[1], len(q)), torch.nan)
    with gluon_simulator.in_place_of_gluon():
        arguments = launch.forward_arguments(q, k, v, out, lse, plan, order, *of_columns, bias, mask, scale)
    run(kernel("forward.py", "forward_blocks", replaced), programs, arguments)
    return out, lse


def backward(q, k, v, dout, cu_seqlens, alpha, out, lse, mask="column", scale=None, programs=3, replaced=None):
    """dq, dk and dv by the simulated kernels; what nothing writes is NaN."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    plan, bias = plan_of(cu_seqlens, alpha, mask)
    gradients = {name: torch.full(x.shape, torch.nan, dtype=x.dtype) for name, x in (("dq", q), ("dk", k), ("dv", v))}
    sums, order = sums_of_rows(out, dout, lse, plan, bias, mask), order_of(plan, mask)
    sums["closed_bias"], _ = pieces_of(plan, bias, q.dtype, mask, scale)
    with gluon_simulator.in_place_of_gluon():
        of_dq, of_dk = launch.backward_arguments(q, k, v, dout, gradients, sums, plan, order, bias, mask, scale)
    run(kernel("dq.py", "dq_blocks", replaced), programs, of_dq)
    run(kernel("dk_dv.py", "dk_dv_blocks", replaced), programs, of_dk)
    return tuple(gradients.values())


def run(kernel, programs, arguments):
    gluon_simulator.launch(kernel, programs, arguments, seed=random.getrandbits(30))


def assert_as_exact_as_pytorch(arguments, alpha, mask, programs=3):
    """Out, lse and gradients against fp64, as soft_mask_cases.assert_as_exact_as_pytorch."""
    exact = results_and_gradients(soft_mask_attention_reference, arguments, alpha, mask, dtype=torch.float64)
    plain = results_and_gradients(soft_mask_attention_reference, arguments, alpha, mask)
    bounds = rounding_bounds(arguments, alpha, mask, None)
    q, k, v, dout, cu_seqlens = (arguments[name] for name in ("q", "k", "v", "dout", "cu_seqlens"))
    out, lse = forward(q, k, v, cu_seqlens, alpha, mask, programs=programs)
    gradients = backward(q, k, v, dout, cu_seqlens, alpha, out, lse, mask, programs=programs)
    for name, found in zip(exact, (out, lse, *gradients)):
        assert found.shape == exact[name].shape and found.dtype == plain[name].dtype, name
        assert_within(name, found, plain[name], exact[name], bounds[name])
