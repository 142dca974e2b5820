"""Random inputs for the soft-masked attention's tests, and the rule by which a result is right."""

import inspect
import itertools
import random
from collections import Counter
from fractions import Fraction

import torch
from rounding import assert_within

from conan_kernels.attention import gradients, launch, tiles
from conan_kernels.attention.hopper import BLOCK
from conan_kernels.attention.reference import soft_mask_attention_reference, soft_mask_bias
from conan_kernels.attention.schedule import PIECES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 4096  # of the L x L matrices at a time, of which there are a dozen in fp64
NAMES = ("out", "lse", "dq", "dk", "dv")


def batch(lengths, H, G, D, dtype=torch.float32, device=DEVICE):
    """q [T, H, D], k and v [T, G, D], dout [T, H, D] and cu_seqlens by name, drawn anew each time."""
    T = sum(lengths)
    shapes = {"q": (T, H, D), "k": (T, G, D), "v": (T, G, D), "dout": (T, H, D)}
    arguments = {name: torch.randn(shape).to(device, dtype) for name, shape in shapes.items()}
    arguments["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return arguments


def plan_of(cu_seqlens, alpha, mask, block=BLOCK):
    """(slots int32 [S, 4], bias fp32 [T]) as plan_blocks fills them."""
    T = int(cu_seqlens[-1])
    bias = torch.empty(T, device=cu_seqlens.device)
    slots = cu_seqlens.new_empty(T // block + len(cu_seqlens) - 1, 4)
    alpha = torch.tensor(float(alpha), device=cu_seqlens.device)
    assert launch.slots_of(cu_seqlens, alpha, bias, slots, mask, block).all()
    return slots, bias


def order_of(slots, mask):
    """int32 [S + 1], as order_slots fills it."""
    order = slots.new_empty(len(slots) + 1)
    launch.fill_order(slots, order, mask)
    return order


def pieces_of(slots, bias, dtype, mask, scale):
    """(closed_bias fp32 [S * BLOCK], pieces [S * BLOCK, 16] of dtype) as split_bias fills them."""
    closed_bias = bias.new_empty(len(slots) * BLOCK)
    pieces = bias.new_empty(len(slots) * BLOCK, PIECES.value, dtype=dtype)
    launch.split(bias, slots, closed_bias, pieces, mask, scale)
    return closed_bias, pieces


def results_and_gradients(form, arguments, *options, dtype=None, **named):
    """out, lse and the gradients of sum(out * dout), by name; all vectors in `dtype` where given."""
    q, k, v, dout = (arguments[name].detach().to(dtype or arguments[name].dtype) for name in ("q", "k", "v", "dout"))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = form(*leaves, arguments["cu_seqlens"], *options, return_lse=True, **named)
    return dict(zip(NAMES, (out.detach(), lse, *torch.autograd.grad(out, leaves, dout))))


def assert_as_exact_as_pytorch(form, arguments, alpha, mask="column", scale=None):
    """Against the reference form in fp64: no error is above twice the largest of the reference form in the inputs'
    dtype, or, where that is larger, above what rounding may do to that number (`rounding_bounds`); and so for the root
    mean square."""
    exact = results_and_gradients(soft_mask_attention_reference, arguments, alpha, mask, scale, dtype=torch.float64)
    plain = results_and_gradients(soft_mask_attention_reference, arguments, alpha, mask, scale)
    found = results_and_gradients(form, arguments, alpha, mask, scale)
    bounds = rounding_bounds(arguments, alpha, mask, scale)
    for name, expected in exact.items():
        assert found[name].shape == expected.shape and found[name].dtype == plain[name].dtype, name
        if expected.numel():
            assert_within(name, found[name], plain[name], expected, bounds[name])


def rounding_bounds(arguments, alpha, mask, scale):
    """By name, for each number of the results, what rounding may do to it on any processor and in any order of
    summation, to first order. eps is fp32's, h that of the inputs' dtype, to which weights are rounded before they
    multiply, and results at the end. With X_ij = scale * sum_d |q_id k_jd| and P, S, dP, delta as in
    kernels/attention/api.py:

        e_ij = eps (sqrt(D) X_ij + 2 max|S| + 4)       the exponent: its product, its size when the maximum is taken off
            it, exp
        r_ij = e_ij + sum_j P_ij e_ij + sqrt(l) eps    the weight, relative to itself, once it is normalised
        out  : sum_j P_ij (r_ij + h) |v_j|                                dv : sum_i P_ij (r_ij + h) |dout_i|
        dS_ij: P_ij ((r_ij + h) |dP_ij - delta_i| + |dout_i| . (sqrt(D) eps (|v_j| + |out_i|) + error of out_i))
        dq   : scale sum_j error of dS_ij |k_j|                           dk : scale sum_i error of dS_ij |q_i|
    """
    q, k, v, dout = (arguments[name].double() for name in ("q", "k", "v", "dout"))
    h = torch.finfo(arguments["q"].dtype).eps
    eps = torch.finfo(torch.float32).eps
    (_, H, D), G = q.shape, k.shape[1]
    scale = D**-0.5 if scale is None else scale
    bounds = {
        "out": torch.zeros_like(q),
        "lse": q.new_zeros(H, len(q)),
        "dq": torch.zeros_like(q),
        "dk": torch.zeros_like(k),
        "dv": torch.zeros_like(v),
    }
    ends = arguments["cu_seqlens"].tolist()
    for start, end in zip(ends, ends[1:]):
        own, length = slice(start, end), end - start
        bias = soft_mask_bias(length, alpha, mask, dtype=torch.float32, device=q.device) if length else 0
        for head, first in itertools.product(range(H), range(0, length, ROWS)):
            group, rows = head // (H // G), slice(start + first, min(start + first + ROWS, end))
            Q, K, V, dO = q[rows, head], k[own, group], v[own, group], dout[rows, head]  # [rows or l, D]
            S = scale * Q @ K.T + bias[first : first + ROWS]  # [rows, l]
            peak = torch.where(S.isfinite(), S.abs(), 0).max()
            P, lse = S.softmax(1), S.logsumexp(1)
            out, many = P @ V, length**0.5 * eps
            e = eps * (D**0.5 * scale * Q.abs() @ K.abs().T + 2 * peak + 4)
            of_row = (P * e).sum(1, keepdim=True)
            r = P * (e + of_row + many + h)  # of the weight, absolute
            of_out = r @ V.abs() + h * out.abs()
            dP, delta = dO @ V.T, (dO * out).sum(1, keepdim=True)
            magnitude = dO.abs() @ V.abs().T + (dO * out).abs().sum(1, keepdim=True)
            of_dS = r * (dP - delta).abs() + P * (D**0.5 * eps * magnitude + (dO.abs() * of_out).sum(1, keepdim=True))
            dS = P * (dP - delta)
            of_dS += (h + many) * dS.abs()
            bounds["out"][rows, head] = of_out
            bounds["lse"][head, rows] = of_row[:, 0] + many + eps * lse.abs()
            bounds["dq"][rows, head] = scale * of_dS @ K.abs() + h * (scale * dS @ K).abs()
            # over rows in parts: a little larger
            bounds["dk"][own, group] += scale * of_dS.T @ Q.abs() + h * (scale * dS.T @ Q).abs()
            bounds["dv"][own, group] += r.T @ dO.abs() + h * (P.T @ dO).abs()
    return bounds


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
    """Makes the interpreted kernels count the products of queries and keys: -> Counter of (loop, kind), one for each
    tile and head that `attend`, `add_dq` and `add_dk_dv` compute; kind is PLAIN, MIXED or FUTURE."""
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

    for module, names, a_tile in ((tiles, ["attend"], 1), (gradients, ["add_dq", "add_dk_dv"], 2)):
        for name in names:
            monkeypatch.setattr(module, name, loop(getattr(module, name)))
        # the backward computes q.k and dout.v
        monkeypatch.setattr(module, "inner_products", products(module.inner_products, a_tile))
    return counts


def constant(x):
    return getattr(x, "value", x)
