"""The rule of all parity tests: as exact as PyTorch, or as rounding allows.

A bound on rounding holds on any processor and in any order of summation, where PyTorch's own error is another on each:
with eps the distance from 1 to the next number, a sum of n products errs by sqrt(n) * eps of the sum of their absolute
values, but for an unlikely few (arXiv 1906.10465), and an exponential by eps times the size of what its exponent was
made of. What an operation makes of these, its cases file says (`rounding_bounds`). Below the smallest normal number eps
says nothing: there a number keeps fewer bits, or on some processors none.
"""

import torch


def assert_within(name, found, plain, expected, bound):
    """No error against `expected` (fp64) is above twice the largest of `plain`, the obvious form in the same dtype, or,
    where that is larger, above `bound`: what rounding may do to each number, or to any. So for the root mean square
    too."""
    error, of_plain = ((x.double() - expected).abs() for x in (found, plain))
    assert error.isfinite().all(), f"{name}: not finite"
    of_dtype = torch.finfo(found.dtype)
    underflow = max(torch.finfo(torch.float32).smallest_normal, of_dtype.smallest_normal * of_dtype.eps)
    bound = torch.as_tensor(bound, dtype=torch.float64, device=error.device).expand_as(error) + underflow
    allowed = bound.clamp(min=2 * of_plain.max().item())
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"{name}: error {error.flatten()[worst]:.2e}, allowed {allowed.flatten()[worst]:.2e}"
    )
    rms, rms_of_plain, rms_of_bound = (x.square().mean().sqrt().item() for x in (error, of_plain, bound))
    assert rms <= max(2 * rms_of_plain, rms_of_bound), (
        f"{name}: RMS error {rms:.2e}, allowed {max(2 * rms_of_plain, rms_of_bound):.2e}"
    )
