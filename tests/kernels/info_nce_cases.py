"""Random inputs for the InfoNCE tests, and the rule by which a form is right."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from conan_kernels import Margin
from conan_kernels.reference_info_nce import info_nce_reference, unit

NAMES = ("loss", "loss_per_dim", "positive", "hard", "accuracy", "dqueries", "ddocuments", "dtemperature", "dhard")


def batch(N, M, E, K=0, groups=False, temperature=0.05, dtype=torch.float32, seed=0, device="cpu"):
    """Arguments of `info_nce` by name: queries near their positives, some documents twice, some the positive of several."""
    generator = torch.Generator().manual_seed(seed)
    documents = torch.randn(M, E, generator=generator) * torch.rand(M, 1, generator=generator).add(0.1)
    target = torch.randint(M, (N,), generator=generator)
    if M > 8:  # the twins are nobody's positive: whether a positive beats its own twin is a matter of rounding
        documents[M // 2 :: 7] = documents[0]
        target[(target == 0) | ((target >= M // 2) & ((target - M // 2) % 7 == 0))] = 1
    queries = documents[target] + 0.6 * torch.randn(N, E, generator=generator)
    arguments = {"queries": queries.to(dtype), "documents": documents.to(dtype), "target": target}
    arguments["temperature"] = torch.tensor(temperature)
    if K:
        arguments["hard"] = (queries[:, None] + 1.5 * torch.randn(N, K, E, generator=generator)).to(dtype)
    if groups:
        arguments["query_group"] = torch.randint(-1, 5, (N,), generator=generator)
        arguments["document_group"] = torch.randint(-1, 5, (M,), generator=generator)
    return {name: value.to(device) for name, value in arguments.items()}


def clear_margin(arguments, dims, fraction=False):
    """A margin in the widest gap between the similarities' distances from the positives', so that no rounding crosses it."""
    distances = []
    for dim in dims:
        q, d = (unit(arguments[name][:, :dim].double()) for name in ("queries", "documents"))
        positive = (q * d[arguments["target"]]).sum(1)
        distance = q @ d.T - positive[:, None]
        distances.append(distance / positive.abs()[:, None] if fraction else distance)
    found = torch.cat([x.flatten() for x in distances]).sort().values
    found = found[(found > -0.6) & (found < -0.2)]  # well below 0: a margin that leaves something out
    widest = found.diff().argmax()
    middle = found[widest : widest + 2].mean().item()
    return Margin(fraction=middle) if fraction else Margin(absolute=middle)


def results_and_gradients(form, arguments, dtype=None, **options):
    """The five results, then the gradients of 1.7 * loss; vectors and temperature in `dtype` where given."""
    arguments = dict(arguments)
    leaves = [name for name in ("queries", "documents", "temperature", "hard") if name in arguments]
    for name in leaves:
        arguments[name] = arguments[name].detach().to(dtype or arguments[name].dtype).requires_grad_()
    result = form(**arguments, **options)
    gradients = torch.autograd.grad(1.7 * result.loss, [arguments[name] for name in leaves])
    return dict(zip(NAMES, (*result, *gradients)))


def assert_as_exact_as_textbook(form, arguments, times=4.0, **options):
    """The form's error against the fp64 textbook form is at most `times` that of the textbook form in fp32, plus what
    rounding cosines and their log-sum-exp makes of a probability (2 eps / T), plus the rounding of the result to its own dtype.
    In bf16 the kernels round the softmax for the gradients' products: there twice the error of the textbook form in bf16
    is allowed too."""
    exact = results_and_gradients(info_nce_reference, arguments, torch.float64, **options)
    plain = results_and_gradients(info_nce_reference, arguments, torch.float32, **options)
    rounded = results_and_gradients(info_nce_reference, arguments, **options)
    found = results_and_gradients(form, arguments, **options)
    eps, T = torch.finfo(torch.float32).eps, arguments["temperature"].item()
    for name, expected in exact.items():
        if expected.numel() == 0:
            continue
        largest = expected.abs().max().item()
        relative = 16 * eps + 2 * eps / T
        if found[name].dtype != torch.float32:
            relative += torch.finfo(found[name].dtype).eps
        # 1e-10 is fp64's own rounding at T = 0.005
        allowed = times * (plain[name] - expected).abs().max().item() + relative * largest + 1e-10
        if name == "dtemperature":  # a sum of probability * z / T, |z| <= 1 / T, that may cancel
            allowed += 64 * eps / T**2
        if found[name].dtype == torch.bfloat16:
            allowed = max(allowed, 2 * (rounded[name] - expected).abs().max().item())
        error = (found[name].double() - expected).abs().max().item()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, largest value {largest:.2e}"


def multiply_bf16_in_the_interpreter(monkeypatch):
    """Triton's interpreter (3.9) multiplies bf16 as the 16-bit integers it keeps them in: widen them to fp32 before."""
    original = interpreter.InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *options):
        return original(self, widened(a), widened(b), d, *options)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
