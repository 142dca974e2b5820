"""The Triton kernels of what lies between matrix products; api.py launches them.

Each reads its inputs once and writes its outputs once, so memory bounds its time. All compute in fp32.
"""

import triton
import triton.language as tl


@triton.jit
def rms_norm_row(x, y, total, weight, out, inverse, C, eps, BLOCK: tl.constexpr):
    """A row of total = x + y, out = total * inverse * weight, and inverse = 1 / sqrt(mean(total^2) + eps); y and
    total may be None.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    values = tl.load(x + row * C + columns, mask=inside, other=0.0).to(tl.float32)
    if y is not None:
        values += tl.load(y + row * C + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + row * C + columns, values.to(total.dtype.element_ty), mask=inside)
    inverted = 1.0 / tl.sqrt(tl.sum(values * values, 0) / C + eps)
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(inverse + row, inverted)
    tl.store(out + row * C + columns, (values * inverted * weights).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "each"])
def rms_norm_gradients(x, weight, inverse, dout, dtotal, dx, dy, dweight, rows, each, C, BLOCK: tl.constexpr):
    """dx of `each` rows, also as dy in another dtype, and their summands of dweight [programs, C], fp32.

    Every sum has one owner, so the bits are the same on every run. x is what was normalised, dtotal the gradient that
    it gets from elsewhere; dtotal and dy may be None.
    """
    first = tl.program_id(0).to(tl.int64) * each
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for row in range(first, tl.minimum(first + each, rows)):
        here = row * C + columns
        normed = tl.load(x + here, mask=inside, other=0.0).to(tl.float32) * tl.load(inverse + row)
        given = tl.load(dout + here, mask=inside, other=0.0).to(tl.float32)
        sums += given * normed
        given *= weights
        along = tl.sum(given * normed, 0) / C  # the part of the gradient along x, which the norm removes
        gradient = (given - normed * along) * tl.load(inverse + row)
        if dtotal is not None:
            gradient += tl.load(dtotal + here, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + here, gradient.to(dx.dtype.element_ty), mask=inside)
        if dy is not None:
            tl.store(dy + here, gradient.to(dy.dtype.element_ty), mask=inside)
    tl.store(dweight + tl.program_id(0).to(tl.int64) * C + columns, sums, mask=inside)


@triton.jit
def rotate_token(
    x,
    cos,
    sin,
    out,
    stride,
    sign,
    N: tl.constexpr,
    TURNED: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The N heads of a token: rotate the pairs (x[d], x[d + HALF]) of the first TURNED heads by cos and sign * sin
    [T, HALF], copy the others.
    """
    token = tl.program_id(0).to(tl.int64)
    heads, columns = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    c = tl.load(cos + token * HALF + columns, mask=columns < HALF, other=1.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * HALF + columns, mask=columns < HALF, other=0.0).to(tl.float32)[None, :] * sign
    for first in tl.static_range(0, N, HEADS):
        head = first + heads
        inside = (head < N)[:, None] & (columns < HALF)[None, :]
        here = head[:, None] * (2 * HALF) + columns[None, :]
        a = tl.load(x + token * stride + here, mask=inside).to(tl.float32)
        b = tl.load(x + token * stride + here + HALF, mask=inside).to(tl.float32)
        turned = (head < TURNED)[:, None]
        out_a, out_b = tl.where(turned, a * c - b * s, a), tl.where(turned, b * c + a * s, b)
        there = out + token * (N * 2 * HALF) + here
        tl.store(there, out_a.to(out.dtype.element_ty), mask=inside)
        tl.store(there + HALF, out_b.to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_row(gate_up, out, F, BLOCK: tl.constexpr):
    """A part of a row of silu(gate) * up; gate_up [T, 2F], out [T, F]."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    gate = tl.load(gate_up + row * 2 * F + columns, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + columns, mask=inside).to(tl.float32)
    tl.store(out + row * F + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_gradients(gate_up, dout, dgate_up, F, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    here = row * 2 * F + columns
    gate = tl.load(gate_up + here, mask=inside).to(tl.float32)
    up = tl.load(gate_up + here + F, mask=inside).to(tl.float32)
    given = tl.load(dout + row * F + columns, mask=inside).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    tl.store(dgate_up + here, (given * up * (share + silu * (1 - share))).to(dgate_up.dtype.element_ty), mask=inside)
    tl.store(dgate_up + here + F, (given * silu).to(dgate_up.dtype.element_ty), mask=inside)


@triton.jit
def sum_sequence(x, cu_seqlens, out, C, BLOCK: tl.constexpr):
    """Some columns of the sum over a sequence's rows, in order: the same bits on every run."""
    first = tl.load(cu_seqlens + tl.program_id(0)).to(tl.int64)
    last = tl.load(cu_seqlens + tl.program_id(0) + 1).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < C
    sums = tl.zeros((BLOCK,), tl.float32)
    for row in range(first, last):
        sums += tl.load(x + row * C + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(0).to(tl.int64) * C + columns, sums, mask=inside)


@triton.jit
def softmax_row(logits, peak, total, V, BLOCK: tl.constexpr):
    """A row's largest logit and the sum of exp(logit - largest)."""
    row = tl.program_id(0).to(tl.int64)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        values = tl.load(logits + row * V + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, values)
        finite = tl.maximum(higher, -3e38)  # for a lane beyond V: exp(-inf), not exp(-inf + inf)
        sums = sums * tl.exp(highest - finite) + tl.exp(values - finite)
        highest = higher
    largest = tl.max(highest, 0)
    tl.store(peak + row, largest)
    tl.store(total + row, tl.sum(sums * tl.exp(highest - largest), 0))


@triton.jit
def softmax_gradient(logits, lse, target, V, BLOCK: tl.constexpr):
    """Replace a part of a row's logits by softmax, minus 1 at the target; target -1: no column of these."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    here = logits + row * V + columns
    values = tl.load(here, mask=inside).to(tl.float32)
    p = tl.exp(values - tl.load(lse + row)) - tl.where(columns == tl.load(target + row), 1.0, 0.0)
    tl.store(here, p.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def add_part(total, part, factor, n, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """total += part * factor (fp32; None is 1), each of its own dtype; FIRST: total = part * factor."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    values = tl.load(part + place, mask=inside).to(tl.float32)
    if factor is not None:
        values *= tl.load(factor)
    if not FIRST:
        values = tl.load(total + place, mask=inside) + values
    tl.store(total + place, values.to(total.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def adamw_part(
    weight, gradient, mean, square, rounded, n, scale, kept, beta1, rest1, beta2, rest2, rate, root, eps,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """An update of n weights; rest1 is 1 - beta1, which fp32 would round, kept 1 - lr * decay, rate and root have the
    bias corrections. rounded: the new weights in another dtype, or None. WHOLE: BLOCK divides n. (Behind a mask that
    may end anywhere, loads are of one number instead of 16 bytes.)
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = None if WHOLE else place < n
    g = tl.load(gradient + place, mask=inside) * scale
    m = beta1 * tl.load(mean + place, mask=inside) + rest1 * g
    v = beta2 * tl.load(square + place, mask=inside) + rest2 * g * g
    step = tl.div_rn(rate * m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    w = kept * tl.load(weight + place, mask=inside) - step
    tl.store(mean + place, m, mask=inside)
    tl.store(square + place, v, mask=inside)
    tl.store(weight + place, w, mask=inside)
    if rounded is not None:
        tl.store(rounded + place, w.to(rounded.dtype.element_ty), mask=inside)
