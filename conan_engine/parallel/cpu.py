"""What a CPU needs to be told, or asked."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h
FLOPS, ROUNDS = 2 * 10**9, 5  # of a measured product, forward and backward


def settle_memory() -> None:
    """Call it before the first product. glibc then keeps freed memory instead of giving it back to the kernel, which
    zeroes every page when it is asked for it again: a training step takes 1.06 s instead of 1.50 (2 layers, width 256,
    14,823 tokens, 2 cores). The process stays as large as it ever was. Does nothing where the C library has no mallopt.

    And oneDNN, which torch multiplies bfloat16 with, keeps the code it made for the last 16 shapes instead of 1024: no
    two steps have as many tokens, and a shape takes up to 2 MB. The demo took 9.2 GB instead of 1.7, in the same time.
    """
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):  # torch's own in front of it, and oneDNN's
        os.environ.setdefault(cache, "16")
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(M_ARENA_MAX, 1)  # the backward runs in a thread of its own and shall reuse the forward's memory


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for it (x86: AVX-512 BF16 or AMX). Without them torch computes in float32 all
    the same, and converts to and fro."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def bfloat16_rate(width: int, ffn: int) -> float | None:
    """How many times as fast as in float32 a product of [tokens, width] with [width, 2 ffn] is in bfloat16, with its
    gradients and conversions; measured for a tenth of a second or so, None without the instructions. One has them and
    is slower all the same."""
    if not multiplies_bfloat16():
        return None
    tokens = max(64, min(2048, FLOPS // (12 * width * ffn)))
    chance = torch.Generator().manual_seed(0)  # the run's own random numbers are left alone
    x, weight = (torch.randn(rows, width, generator=chance).requires_grad_() for rows in (tokens, 2 * ffn))

    def seconds(bfloat16):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            out = torch.nn.functional.linear(x, weight)
        out.backward(out.detach())
        return time.perf_counter() - began

    # the first makes the code
    found = [[seconds(bfloat16) for bfloat16 in (False, True)] for _ in range(ROUNDS + 1)][1:]
    return statistics.median(one for one, _ in found) / statistics.median(other for _, other in found)
