"""Random inputs for the soft-masked attention's tests, and the rule by which a result is right."""

import inspect
import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from conan_kernels import soft_mask_gradients, soft_mask_tiles
from conan_kernels.reference import soft_mask_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("out", "lse", "dq", "dk", "dv")


def batch(lengths, H, G, D, dtype=torch.float32, device=DEVICE):
    """q [T, H, D], k and v [T, G, D], dout [T, H, D] and cu_seqlens by name, drawn anew each time."""
    T = sum(lengths)
    shapes = {"q": (T, H, D), "k": (T, G, D), "v": (T, G, D), "dout": (T, H, D)}
    arguments = {name: torch.randn(shape).to(device, dtype) for name, shape in shapes.items()}
    arguments["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return arguments


def results_and_gradients(form, arguments, *options, dtype=None, **named):
    """out, lse and the gradients of sum(out * dout), by name; all vectors in `dtype` where given."""
    q, k, v, dout = (arguments[name].detach().to(dtype or arguments[name].dtype) for name in ("q", "k", "v", "dout"))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = form(*leaves, arguments["cu_seqlens"], *options, return_lse=True, **named)
    return dict(zip(NAMES, (out.detach(), lse, *torch.autograd.grad(out, leaves, dout))))


MEASURES = {"largest error": torch.max, "RMS error": lambda error: error.square().mean().sqrt()}


def assert_as_exact_as_pytorch(form, arguments, alpha, mask="column", scale=None):
    """Against the reference form in fp64, the largest error and the root mean square of the errors are at most twice those
    of the reference form in the inputs' dtype. To this comes fp32's own rounding, for what is exactly 0 in one order of
    summation (the gradient by the query of a sequence of one token) is not in another. The largest of a few errors is a
    matter of luck: where it is above that, the mean over 16 draws decides."""
    if faults(form, [arguments], alpha, mask, scale):
        found = faults(form, [arguments, *(redrawn(arguments) for _ in range(15))], alpha, mask, scale)
        assert not found, "; ".join(found)


def faults(form, draws, *options):
    """A line for each result and measure that, in the mean over the draws, is above what is allowed."""
    totals = Counter()
    for arguments in draws:
        exact = results_and_gradients(soft_mask_attention_reference, arguments, *options, dtype=torch.float64)
        plain = results_and_gradients(soft_mask_attention_reference, arguments, *options)
        found = results_and_gradients(form, arguments, *options)
        for name, expected in exact.items():
            assert found[name].shape == expected.shape and found[name].dtype == plain[name].dtype, name
            if expected.numel() == 0:
                continue
            rounding = 32 * torch.finfo(torch.float32).eps * max(1, expected.abs().max().item())
            for what, of in MEASURES.items():
                error, of_plain = (of((x[name].double() - expected).abs()).item() for x in (found, plain))
                assert math.isfinite(error), f"{name}: {what} {error}"
                totals[name, what, "found"] += error / len(draws)
                totals[name, what, "allowed"] += (2 * of_plain + rounding) / len(draws)
    pairs = [(name, what, totals[name, what, "found"], totals[name, what, "allowed"]) for name in NAMES for what in MEASURES]
    return [f"{name}: {what} {error:.2e}, allowed {allowed:.2e}" for name, what, error, allowed in pairs if error > allowed]


def redrawn(arguments):
    """Other vectors of the same sizes."""
    return {name: x if name == "cu_seqlens" else torch.randn_like(x) * x.std() for name, x in arguments.items()}


def round_to_bf16_in_the_interpreter(monkeypatch):
    """Triton's interpreter (3.9) cuts fp32 off where the hardware rounds it to the nearest bf16: twice the error."""
    original = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, source, dtype):
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return original(self, source, dtype)
        nearest = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return interpreter.TensorHandle(nearest.view(torch.uint16).numpy(), tl.bfloat16)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast_impl)


def pairwise(*axes):
    """Rows that hold every pair of values of every two axes at least once: far fewer than the product of all."""
    draw = random.Random(0)
    columns = list(itertools.combinations(range(len(axes)), 2))
    missing = {(a, x, b, y) for a, b in columns for x in range(len(axes[a])) for y in range(len(axes[b]))}
    rows = []
    while missing:
        a, x, b, y = min(missing)
        candidates = []
        for _ in range(50):
            row = [draw.randrange(len(axis)) for axis in axes]
            row[a], row[b] = x, y
            candidates.append((row, {(a, row[a], b, row[b]) for a, b in columns}))
        row, covered = max(candidates, key=lambda candidate: len(candidate[1] & missing))
        missing -= covered
        rows.append(tuple(axis[index] for axis, index in zip(axes, row)))
    return rows


def count_tiles(monkeypatch):
    """Makes the interpreted kernels count the products of queries and keys: -> Counter of (loop, kind), one for each tile
    and head that `attend`, `add_dq` and `add_dk_dv` compute; kind is PLAIN, MIXED or FUTURE."""
    counts, running = Counter(), []

    def loop(original):
        parameters = inspect.signature(original.fn)

        def wrapped(*arguments):
            running.append((original.__name__, constant(parameters.bind(*arguments).arguments["KIND"])))
            result = original(*arguments)
            running.pop()
            return result

        return wrapped

    def products(original, a_tile):
        def wrapped(*arguments):
            counts[running[-1]] += Fraction(1, a_tile)
            return original(*arguments)

        return wrapped

    for module, names, a_tile in ((soft_mask_tiles, ["attend"], 1), (soft_mask_gradients, ["add_dq", "add_dk_dv"], 2)):
        for name in names:
            monkeypatch.setattr(module, name, loop(getattr(module, name)))
        # the backward computes q.k and dout.v
        monkeypatch.setattr(module, "inner_products", products(module.inner_products, a_tile))
    return counts


def constant(x):
    return getattr(x, "value", x)
