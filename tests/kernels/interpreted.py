"""What Triton's interpreter (3.6 to 3.9) does with bf16 that no GPU does, set right."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def bf16_as_a_gpu_has_it(monkeypatch):
    _multiply(monkeypatch)
    _round(monkeypatch)


def _multiply(monkeypatch):
    """The interpreter multiplies bf16 as the 16-bit integers it keeps them in: widen them to fp32 before."""
    original = interpreter.InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *options):
        return original(self, widened(a), widened(b), d, *options)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def _round(monkeypatch):
    """The interpreter cuts fp32 off where the hardware rounds it to the nearest bf16: twice the error."""
    original = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, source, dtype):
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return original(self, source, dtype)
        nearest = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return interpreter.TensorHandle(nearest.view(torch.uint16).numpy(), tl.bfloat16)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast_impl)
