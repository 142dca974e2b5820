"""`conan_kernels.pointwise` against the obvious PyTorch form in fp64: on a GPU where there is one, else in Triton's
interpreter."""

import pytest
import torch
import torch.nn.functional as F
from interpreted import bf16_as_a_gpu_has_it
from rounding import assert_within

from conan_kernels.pointwise import api as pointwise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
SIZES = [(1, 1), (0, 5), (3, 64), (7, 100), (10, 3), (5, 3584)]


@pytest.fixture(autouse=True)
def bf16_products(monkeypatch):
    bf16_as_a_gpu_has_it(monkeypatch)
    monkeypatch.setattr(pointwise, "PROGRAMS", 4)  # several rows each, of few


def gradients_of(form, *inputs, dtype=None):
    """Output and gradients of a random combination of it, drawn anew for the first form that is asked and the same for
    the others."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = form(*leaves)
    torch.manual_seed(out.numel())
    dout = torch.randn(out.shape).bfloat16().to(DEVICE, out.dtype)  # any dtype holds it
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)], dout.abs().double()


def compare(names, ours, plain, inputs, bounds):
    exact, dout = gradients_of(plain, *inputs, dtype=torch.float64)
    for name, found, same, wanted, bound in zip(
        names, gradients_of(ours, *inputs)[0], gradients_of(plain, *inputs)[0], exact, bounds(dout)
    ):
        assert found.shape == wanted.shape, name
        if found.numel():
            assert_within(name, found, same.to(found.dtype), wanted, bound)


@pytest.mark.parametrize(("T", "C"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("used", ["both", "norm", "norm of x"])
def test_add_rms_norm(T, C, dtype, used):
    """Of fp32 rows, in fp32 and, as under autocast, in bf16, of which are y and the weights too; what becomes of the
    sum counts or not."""
    x = torch.randn(T, C, device=DEVICE) * 3
    y = torch.randn(T, C, device=DEVICE).to(dtype)
    weight = torch.randn(C, device=DEVICE).to(dtype)
    h = torch.finfo(dtype).eps
    alone = used == "norm of x"

    def joined(total, normed):
        return (
            torch.cat((total.to(torch.promote_types(total.dtype, normed.dtype)), normed)) if used == "both" else normed
        )

    def plain(x, *rest):
        *y, weight = (one.to(x.dtype) for one in rest)
        total = x + y[0] if y else x
        out = F.rms_norm(total, (C,), weight, 1e-6)
        return joined(total, out.to(dtype) if x.dtype == torch.float32 else out)

    def ours(x, *rest):
        return joined(*pointwise.add_rms_norm(x, None if alone else rest[0], rest[-1], 1e-6, dtype))

    def bounds(dout):
        values = x.double() if alone else x.double() + y.double()
        of_total, given = (dout[:T], dout[T:]) if used == "both" else (0 * dout, dout)
        inverse = (values.square().mean(1, keepdim=True) + 1e-6).rsqrt()
        normed, w = (values * inverse).abs(), weight.abs().double()
        many = (C**0.5 + 8) * EPS
        along = (given * w * normed).mean(1, keepdim=True)
        of_x = inverse * (given * w + normed * along) * (2 * many + 2 * h) + of_total * EPS
        of_out = normed * w * (many + h)
        yield torch.cat((values.abs() * EPS, of_out)) if used == "both" else of_out
        yield of_x
        if not alone:
            yield of_x + h * (inverse * (given * w + normed * along) + of_total)
        yield (given * normed).sum(0) * (many + T**0.5 * EPS + 2 * h)

    inputs = (x, weight) if alone else (x, y, weight)
    compare(("out", "dx", "dweight") if alone else ("out", "dx", "dy", "dweight"), ours, plain, inputs, bounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("T", "N", "turned", "D"), [(1, 1, 1, 2), (0, 3, 2, 4), (5, 48, 40, 112), (9, 17, 17, 64), (3, 6, 4, 6)]
)
def test_rotate(dtype, T, N, turned, D):
    whole = torch.randn(T, N + 1, D, device=DEVICE).to(dtype)
    x = whole[:, :N]  # whose tokens are further apart than they are long
    angles = torch.randn(T, 1, D // 2, device=DEVICE) * 100
    cos, sin = angles.cos(), angles.sin()

    def plain(x):
        a, b = x[:, :turned].chunk(2, -1)
        return torch.cat(
            (
                torch.cat((a * cos - b * sin, b * cos + a * sin), -1),
                x[:, turned:].to(torch.promote_types(x.dtype, cos.dtype)),
            ),
            1,
        )

    def bounds(dout):
        size = x.double().abs()
        for values in (size, dout):
            a, b = values.chunk(2, -1)
            yield torch.cat((a + b, a + b), -1) * (4 * EPS + 2 * torch.finfo(dtype).eps)

    compare(("out", "dx"), lambda x: pointwise.rotate(x, cos, sin, turned), plain, (x,), bounds)
    torch.testing.assert_close(pointwise.rotate(x, cos, sin, turned)[:, turned:], x[:, turned:], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "width"), [(1, 1), (0, 5), (3, 64), (7, 1500), (2, 1024)])
def test_swiglu(dtype, T, width):
    gate_up = (torch.randn(T, 2 * width, device=DEVICE) * 4).to(dtype)

    def plain(x):
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def bounds(dout):
        gate, up = gate_up.double().abs().chunk(2, -1)
        h = (gate + 16) * EPS + 2 * torch.finfo(dtype).eps  # the exponential's error is eps times its exponent
        yield gate * up * h
        yield torch.cat((dout * up * (2 + gate) * h, dout * gate * h), -1)

    compare(("out", "dgate_up"), pointwise.swiglu, plain, (gate_up,), bounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lengths", "C"), [([1], 1), ([0, 3, 0, 0, 70], 130), ([], 5), ([0], 4), ([9, 1], 512)])
def test_sum_sequences(dtype, lengths, C):
    x = torch.randn(sum(lengths), C, device=DEVICE).to(dtype)
    cu_seqlens = F.pad(torch.tensor(lengths, dtype=torch.int32), (1, 0)).cumsum(0).int().to(DEVICE)

    def plain(x):
        return torch.stack([rows.sum(0) for rows in x.split(lengths)]) if lengths else x[:0] * 1

    def bounds(dout):
        yield (
            torch.stack([rows.double().abs().sum(0) for rows in x.split(lengths)]) * (sum(lengths) ** 0.5 + 2) * EPS
            if lengths
            else 0.0
        )
        yield torch.finfo(dtype).eps * dout.sum()

    compare(("out", "dx"), lambda x: pointwise.sum_sequences(x, cu_seqlens), plain, (x,), bounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "V"), [(1, 1), (3, 100), (2, 4096), (4, 9001)])
def test_softmax_of_logits_and_its_gradient(dtype, n, V):
    logits = (torch.randn(n, V, device=DEVICE) * 10).to(dtype)
    logits[0, 0] = -1e4 if V > 1 else 3.0
    target = torch.randint(-1, V, (n,), device=DEVICE)
    peak, total = pointwise.softmax_sums(logits)
    exact = logits.double()
    size = exact.abs().max() * 2 + 4
    torch.testing.assert_close(peak, logits.amax(1).float(), rtol=0, atol=0)
    lse = peak + total.log()
    bound = EPS * (size + V**0.5)
    assert_within("lse", lse, logits.float().logsumexp(1), exact.logsumexp(1), bound)
    wanted = exact.softmax(1)
    bound = wanted * (2 * bound) + torch.finfo(dtype).eps * wanted
    for row, column in enumerate(target.tolist()):
        if column >= 0:
            wanted[row, column] -= 1
            bound[row, column] += (2 * EPS + torch.finfo(dtype).eps) * wanted[row, column].abs()
    found = pointwise.softmax_minus_target_(logits, lse, target)
    assert found.data_ptr() == logits.data_ptr()
    assert_within("gradient", found, wanted.to(dtype), wanted, bound)


@pytest.mark.parametrize(
    ("into", "what"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float32),
    ],
)
@pytest.mark.parametrize("form", [pointwise.add_, pointwise._add_part])  # the second: the kernel, on a CPU too
def test_add(into, what, form):
    factor = torch.tensor(0.3, device=DEVICE)
    for shape in ((0,), (1,), (5000,), (37, 91)):
        total, part = torch.randn(shape, device=DEVICE, dtype=into), torch.randn(shape, device=DEVICE).to(what)
        wanted = (total.double() + part.double()).to(into)
        exact = {} if into == torch.bfloat16 else {"rtol": 0, "atol": 0}  # rounded once more, through float32
        torch.testing.assert_close(form(total, part, False, None), wanted, **exact)
        total.fill_(torch.nan)
        torch.testing.assert_close(form(total, part, True, None), part.to(into), rtol=0, atol=0)
        wanted = (part.float() * factor).to(into)
        torch.testing.assert_close(form(total, part, True, factor), wanted)
        torch.testing.assert_close(form(total, part, False, factor), 2 * wanted)


@pytest.mark.parametrize("n", [0, 1, 2048, 3001])
@pytest.mark.parametrize("rounded", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs(n, rounded, decay):
    """Against torch.optim.AdamW in fp64, from moments of any age; a step is a number of at most lr times a few."""
    draw = lambda scale=1.0: (torch.randn(n, device=DEVICE) * scale).float()
    weight, mean, square = draw(), draw(0.1), draw().square() + 0.1
    low = None if rounded is None else torch.full((n,), torch.nan, device=DEVICE, dtype=rounded)
    lr, betas, eps, scale, before = 1e-2, (0.9, 0.95), 1e-8, 0.37, 6
    forms = {}
    for dtype in (torch.float64, torch.float32):
        one = torch.nn.Parameter(weight.to(dtype, copy=True))
        adam = torch.optim.AdamW([one], lr=lr, betas=betas, eps=eps, weight_decay=decay)
        state = {"exp_avg": mean, "exp_avg_sq": square}
        adam.state[one] = {key: x.to(dtype, copy=True) for key, x in state.items()} | {
            "step": torch.tensor(float(before))
        }
        forms[dtype] = one, adam
    for step in range(before + 1, before + 4):
        gradient = draw(3.0) if step > before + 1 else torch.zeros(n, device=DEVICE)
        pointwise.adamw_(weight, gradient, mean, square, low, step, lr, scale, betas, eps, decay)
        for dtype, (one, adam) in forms.items():
            one.grad = gradient.to(dtype) * scale
            adam.step()
    (exact, by), (plain, _) = forms[torch.float64], forms[torch.float32]
    if n:
        # three steps, each of which rounds the weight twice, and moves it by a few lr that have a few roundings
        bound = 3 * EPS * (2 * exact.detach().abs() + 10 * 10 * lr)
        assert_within("weight", weight, plain.detach(), exact.detach(), bound)
        for name, found in (("exp_avg", mean), ("exp_avg_sq", square)):
            torch.testing.assert_close(found.double(), by.state[exact][name], rtol=1e-5, atol=1e-6)
    assert low is None or torch.equal(low, weight.to(rounded))


@pytest.mark.parametrize("repeat", range(2))
def test_same_inputs_give_the_same_bits(repeat):
    x, weight = torch.randn(50, 40, device=DEVICE), torch.randn(40, device=DEVICE)
    first, again = (
        gradients_of(lambda x, w: pointwise.add_rms_norm(x, None, w, 1e-6)[1], x, weight)[0] for _ in range(2)
    )
    for one, other in zip(first, again):
        assert torch.equal(one, other)
