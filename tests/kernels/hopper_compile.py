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

from conan_kernels.attention.hopper import BLOCK, dk_dv, dq, forward, launch

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


def launches(D, dtype, mask):
    """What launch.py gives each kernel, for tensors whose contents do not matter here: (kernel, its arguments)."""
    qkv = torch.zeros(T, H + 2 * G, D, dtype=dtype).split((H, G, G), dim=1)
    slots = T // BLOCK + 1
    plan, bias, order = torch.zeros(slots, 4, dtype=torch.int32), torch.zeros(T), torch.zeros(1, dtype=torch.int32)
    pieces = torch.zeros(slots * BLOCK, 16, dtype=dtype)
    out, lse = torch.zeros(T, H, D, dtype=dtype), torch.zeros(H, T)
    sums = {name: torch.zeros(H, slots * BLOCK) for name in ("log_sums", "future_log_sums", "deltas")}
    sums["closed_bias"] = closed_bias = torch.zeros(slots * BLOCK)
    gradients = {name: torch.zeros(T, heads, D, dtype=dtype) for name, heads in (("dq", H), ("dk", G), ("dv", G))}
    common = mask, D**-0.5
    of_dq, of_dk = launch.backward_arguments(*qkv, out, gradients, sums, plan, order, bias, *common)
    yield (
        forward.forward_blocks,
        launch.forward_arguments(*qkv, out, lse, plan, order, closed_bias, pieces, bias, *common),
    )
    yield dq.dq_blocks, of_dq
    yield dk_dv.dk_dv_blocks, of_dk


def row(kernel, given, dtype):
    constants = {name: given.pop(name) for name in ("H", "G", "BLOCK", "D", "W", "STAGES", "BY_ROW")}
    signature = {name: type_of(argument) for name, argument in given.items()}
    machine = sass.compile(kernel, signature, constants, 90, 4, 3, source=GluonASTSource)
    described = {"kernel": kernel.__name__, "D": constants["D"], "dtype": dtype, "arch": 90, "W": constants["W"]}
    loops = [
        sass.describe_loop(loop)
        | {"in_flight": sass.in_flight(loop, "MUFU.EX2"), "lost_factors": len(sass.lost_factors(loop))}
        for loop in machine.loops()
        if "HGMMA" in loop  # the producer's have none
    ]
    return described | {"by_row": constants["BY_ROW"]} | sass.describe(machine) | {"loops": loops}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=launch.DIMS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    chosen = parser.parse_args()
    for D, dtype, mask in itertools.product(chosen.dims, chosen.dtypes, ("column", "row")):
        for kernel, given in launches(D, DTYPES[dtype], mask):
            print(json.dumps(row(kernel, given, dtype)), flush=True)
