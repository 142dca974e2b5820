"""Run by test_hopper_compiled.py and matrix.py, without Triton's interpreter: compiles the kernels in Gluon for sm_90,
which need not be there, and prints what the machine code uses, one JSON a line.

    python tests/kernels/hopper_compile.py [--dims 112 ...] [--dtypes bf16 ...]
"""

import argparse
import itertools
import json

import sass
import torch
from triton.experimental.gluon._runtime import GluonASTSource

from conan_kernels.attention import hopper, hopper_launch, schedule

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.float32: "fp32", torch.int32: "i32"}
H, G, T = 32, 8, 300  # the paper's heads


def type_of(argument):
    """How Triton writes the type of an argument of a launch."""
    if isinstance(argument, torch.Tensor):
        return f"*{NAMES[argument.dtype]}"
    if isinstance(argument, (int, float)):
        return "i32" if isinstance(argument, int) else "fp32"
    block = ",".join(map(str, argument.block_shape))
    return f"tensordesc<{NAMES[argument.base.dtype]}[{block}],{argument.layout!r}>"


def arguments(D, dtype, mask):
    """What hopper_launch gives the kernel, for tensors whose contents do not matter here."""
    qkv = torch.zeros(T, H + 2 * G, D, dtype=dtype)
    slots = T // schedule.BLOCK + 1
    plan, bias = torch.zeros(slots, 4, dtype=torch.int32), torch.zeros(T)
    order, pieces = torch.zeros(slots + 1, dtype=torch.int32), torch.zeros(slots * schedule.BLOCK, 16, dtype=dtype)
    out, lse = torch.zeros(T, H, D, dtype=dtype), torch.zeros(H, T)
    return hopper_launch.arguments(*qkv.split((H, G, G), dim=1), out, lse, plan, order, pieces, bias, mask, D**-0.5)


def row(D, dtype, by_row):
    given = arguments(D, DTYPES[dtype], "row" if by_row else "column")
    constants = {name: given.pop(name) for name in ("H", "G", "BLOCK", "W", "STAGES", "BY_ROW")}
    signature = {name: type_of(argument) for name, argument in given.items()}
    machine = sass.compile(hopper.forward_blocks, signature, constants, 90, 4, 3, source=GluonASTSource)
    described = {"kernel": "forward_blocks", "D": D, "dtype": dtype, "arch": 90, "by_row": by_row, "W": constants["W"]}
    loops = [
        sass.describe_loop(loop) | {"in_flight": sass.in_flight(loop, "MUFU.EX2")}
        for loop in machine.loops()
        if "HGMMA" in loop  # the producer's have none
    ]
    return described | sass.describe(machine) | {"loops": loops}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=hopper_launch.DIMS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    chosen = parser.parse_args()
    for one in itertools.product(chosen.dims, chosen.dtypes, (False, True)):
        print(json.dumps(row(*one)), flush=True)
