"""Run by test_soft_mask_compiled.py and matrix.py, without Triton's interpreter: compiles the soft-masked attention's
kernels for GPUs that need not be there, with the launch options that they would have there, and prints what the machine
code uses, one JSON a line.

    python tests/kernels/soft_mask_compile.py [--full] [--kernels forward_block ...] [--dims 112 ...]
        [--dtypes bf16 ...] [--archs 90 ...]

Without arguments a few configurations; with --full all that ship; the others choose among all. --processes at a time.
"""

import argparse
import itertools
import json
import multiprocessing

import sass
import torch

from conan_kernels.architecture import attention_tiles
from conan_kernels.attention import gradients, tiles

KERNELS = {kernel.fn.__name__: kernel for kernel in (tiles.forward_block, gradients.dq_block, gradients.dk_dv_block)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIMS = (16, 32, 64, 80, 96, 112, 128)
FEW = [(D, "bf16", 90, False) for D in (112, 128, 64)] + [(112, "bf16", 80, False)]


def compile(kernel, options, D, dtype, arch, by_row, H=32, G=8):
    """-> sass.Machine; options as of architecture.attention_tiles; the paper's heads by default."""
    launch = dict(options)
    sizes = {name: launch.pop(name) for name in ("W", "BM", "BN")}
    constants = {"H": H, "G": G, "D": D, "BY_ROW": by_row, **sizes}
    signature = dict.fromkeys(kernel.arg_names, f"*{dtype}") | dict.fromkeys(("lse", "delta", "bias"), "*fp32")
    strides = ("stride_q", "stride_k", "stride_v")  # 16 divides them, as it does D
    signature |= {"plan": "*i32", "scale": "fp32"} | dict.fromkeys(("T", *strides), "i32")
    return sass.compile(kernel, signature, constants, arch, aligned=strides, **launch)


def compile_plan(arch, mask):
    """The plan's kernel: no matrix product, whatever the dtype and head dim."""
    kernel = tiles.plan_blocks
    signature = {
        "cu_seqlens": "*i32",
        "alpha": "*fp32",
        "plan": "*i32",
        "bias": "*fp32",
        "valid": "*i1",
    } | dict.fromkeys(("B", "T", "slots"), "i32")
    return sass.compile(kernel, signature, {"MASK": mask, "BLOCK": 128}, arch, num_warps=4, num_stages=3)


def row(D, dtype, arch, by_row, name):
    if name == "plan_blocks":
        return {"kernel": name, "dtype": "fp32", "arch": arch} | sass.describe(
            compile_plan(arch, "row" if by_row else "column")
        )
    options = attention_tiles(DTYPES[dtype], D, arch)[list(KERNELS).index(name)]
    described = {"kernel": name, "D": D, "dtype": dtype, "arch": arch, "by_row": by_row, "options": options}
    return described | sass.describe(compile(KERNELS[name], options, D, dtype, arch, by_row))


def row_of(arguments):
    return row(*arguments)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--kernels", nargs="+", default=(*KERNELS, "plan_blocks"), choices=(*KERNELS, "plan_blocks"))
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--archs", type=int, nargs="+", default=tuple(sass.SHARED_BYTES), choices=sass.SHARED_BYTES)
    parser.add_argument("--processes", type=int, default=1)
    chosen = parser.parse_args()
    narrowed = any(
        getattr(chosen, name) is not parser.get_default(name) for name in ("kernels", "dims", "dtypes", "archs")
    )
    every = (
        itertools.product(chosen.dims, chosen.dtypes, chosen.archs, (False, True)) if chosen.full or narrowed else FEW
    )
    jobs = [(*one, name) for one in every for name in chosen.kernels if name != "plan_blocks"]
    if "plan_blocks" in chosen.kernels:
        jobs += [
            (None, None, arch, by_row, "plan_blocks")
            for arch in sorted({job[2] for job in jobs})
            for by_row in (False, True)
        ]
    with multiprocessing.get_context("spawn").Pool(chosen.processes) as pool:
        # printed here: lines of several processes would run into one another
        for found in pool.imap_unordered(row_of, jobs):
            print(json.dumps(found), flush=True)
