"""Settings and measurements of the CPU: memory, bfloat16."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from pathlib import Path

import torch

from conan_engine.parallel.cpu_linear import Linear

M_MXFAST, M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = 1, -1, -4, -8  # constants of malloc.h
FLOPS, ROUNDS = 2 * 10**9, 5  # FLOP of a measured product, forward and backward; and how often it is measured


def settle_memory() -> None:
    """Keep freed memory in the process, and few compiled kernels. Call it before the first matrix product.

    glibc otherwise gives freed memory back to the kernel, which zeroes every page when it is asked for it again.
    Keeping it, a training step takes 1.06 s instead of 1.50 (2 layers, width 256, 14,823 tokens, 2 cores). The process
    stays as large as it ever was. Does nothing where the C library has no mallopt.

    torch asks for aligned memory, and glibc cuts off small ends of it. Before glibc 2.39 (its bug 30723) an end that
    waits for reuse keeps the freed block beside it too small for the next tensor of that size. With M_MXFAST = 0 ends
    wait in the thread's cache alone. GLIBC_TUNABLES=glibc.malloc.tcache_count=0 ends that too, if it is set before the
    start.

    oneDNN, which multiplies bfloat16 for torch, then keeps the code of the last 16 shapes instead of 1024. No two steps
    have the same number of tokens, and a shape takes up to 2 MB: the demo took 9.2 GB instead of 1.7, in the same time.
    """
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):  # torch's cache, and oneDNN's behind it
        os.environ.setdefault(cache, "16")
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(M_MXFAST, 0)
        # the backward pass runs in its own thread and must reuse the memory of the forward pass
        library.mallopt(M_ARENA_MAX, 1)


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for it (x86: AVX-512 BF16 or AMX). Without them torch converts and computes
    in float32.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def bfloat16_rate(width: int, ffn: int) -> float | None:
    """How many times faster than in float32 a matrix product is in bfloat16, with its gradients and conversions.

    The product is [tokens, width] with [width, 2 ffn]. It is measured for about a tenth of a second. Returns None if
    the CPU lacks the instructions; some CPUs have them and are slower anyway.
    """
    if not multiplies_bfloat16():
        return None
    tokens = max(64, min(2048, FLOPS // (12 * width * ffn)))
    chance = torch.Generator().manual_seed(0)  # leaves the random numbers of the run alone
    x, weight = (torch.randn(rows, width, generator=chance).requires_grad_() for rows in (tokens, 2 * ffn))
    with torch.device("meta"):
        linear = Linear(width, 2 * ffn)
    linear.weight = torch.nn.Parameter(weight)

    def seconds(bfloat16):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            out = linear(x)
        out.backward(out.detach())
        return time.perf_counter() - began

    # the first round compiles
    found = [[seconds(bfloat16) for bfloat16 in (False, True)] for _ in range(ROUNDS + 1)][1:]
    return statistics.median(one for one, _ in found) / statistics.median(other for _, other in found)
