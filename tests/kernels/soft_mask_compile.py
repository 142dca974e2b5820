"""Run by test_soft_mask_compiled.py, without Triton's interpreter: compiles the soft-masked attention's kernels for GPUs that
need not be there, with the launch options that they would have there, and prints what the machine code uses, one JSON a line.

    python tests/kernels/soft_mask_compile.py [--full] [--kernels forward_block ...] [--dims 112 ...] [--dtypes bf16 ...] [--archs 90 ...]

Without arguments a few configurations; with --full all that ship; the others choose among all.
"""

import argparse
import itertools
import json

import sass
import torch

from conan_kernels import soft_mask_gradients, soft_mask_launch, soft_mask_tiles

KERNELS = {
    kernel.fn.__name__: kernel for kernel in (soft_mask_tiles.forward_block, soft_mask_gradients.dq_block, soft_mask_gradients.dk_dv_block)
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIMS = (16, 32, 64, 80, 96, 112, 128)
FEW = [(D, "bf16", 90, False) for D in (112, 128, 64)] + [(112, "bf16", 80, False)]
OPCODES = ("HGMMA", "HMMA", "FFMA", "FADD", "FMUL", "FMNMX", "FSEL", "MUFU", "LDG", "ISETP", "WARPGROUP", "BAR")


def compile(kernel, options, D, dtype, arch, by_row, parts=None, H=32, G=8):
    """-> sass.Machine; options as of soft_mask_launch.tile_options; the paper's heads by default."""
    launch = dict(options)
    sizes = {name: launch.pop(name) for name in ("BM", "BN")}
    constants = {"H": H, "G": G, "D": D, "PARTS": parts or soft_mask_launch.parts_of(D), "BY_ROW": by_row, **sizes}
    signature = dict.fromkeys(kernel.arg_names, f"*{dtype}") | dict.fromkeys(("lse", "delta", "bias"), "*fp32")
    strides = ("stride_q", "stride_k", "stride_v")  # 16 divides them, as it does D
    signature |= {"plan": "*i32", "scale": "fp32"} | dict.fromkeys(("T", *strides), "i32")
    return sass.compile(kernel, signature, constants, arch, aligned=strides, **launch)


def describe(machine):
    """Its loops innermost: how many instructions, and those of OPCODES with any modifiers."""
    loops = [{"instructions": loop.total()} | {name: counted(loop, name) for name in OPCODES} for loop in machine.loops()]
    used = {"stack": machine.stack, "spills": machine.spills, "registers": machine.registers, "shared_bytes": machine.shared_bytes}
    return used | {"loops": loops}


def counted(loop, opcode):
    return sum(number for name, number in loop.items() if name.partition(".")[0] == opcode)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--kernels", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--archs", type=int, nargs="+", default=(80, 90))
    chosen = parser.parse_args()
    narrowed = any(getattr(chosen, name) is not parser.get_default(name) for name in ("kernels", "dims", "dtypes", "archs"))
    every = itertools.product(chosen.dims, chosen.dtypes, chosen.archs, (False, True))
    for D, dtype, arch, by_row in every if chosen.full or narrowed else FEW:
        for number, (name, kernel) in enumerate(KERNELS.items()):
            if name not in chosen.kernels:
                continue
            options = soft_mask_launch.tile_options(DTYPES[dtype], D, arch // 10)[number]
            row = {"kernel": name, "D": D, "dtype": dtype, "arch": arch, "by_row": by_row, "options": options}
            print(json.dumps(row | describe(compile(kernel, options, D, dtype, arch, by_row))), flush=True)
