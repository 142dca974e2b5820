"""Run by test_info_nce_compiled.py and matrix.py, without Triton's interpreter: compiles the InfoNCE kernels for GPUs
that need not be there, with the launch options that they would have there, and prints what the machine code uses, one
JSON a line.

    python tests/kernels/info_nce_compile.py [--archs 90 ...] [--dtypes bf16 ...]
"""

import argparse
import itertools
import json

import sass
import torch

from conan_kernels import architecture
from conan_kernels.info_nce import launch, rows
from conan_kernels.info_nce import tiles as kernels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
IDS = ("query_group", "document_group", "known_first", "known_last", "known_ids", "starts", "tiles")
# what Triton finds divisible by 16 at the paper's shape, beside the pointers
DIVISIBLE = ("E", "N", "M", "whole_M", "R", "C", "first_row", "first_column", "stride_k", "stride_row", "stride_inner")
KNOWN, COLUMNS = ("known_first", "known_last", "known_ids"), ("columns_lse", "dcolumns")
FLOATS = (
    "rq rd temperature limits lse best share u_positive columns_lse dcolumns uz_rows uz_columns total inverse r_hard "
    "similarity_own positive of_hard tile_lse tile_best others losses gap dpositive uz weighted_hard radial_hard parts"
).split()
VECTORS = ("queries", "documents", "vectors", "hard", "dhard", "out")
FINISH = launch._candidates(7)
# constants of the kernels over rows, as launch.py has them with 7 hard negatives; for Triton what is 1 is one, too
ONE = ("N", "M", "K", "J", "count", "tiles", "column_tiles", "stride")
NONE = dict.fromkeys(("hard", "dhard", "weighted_hard", "radial_hard"))
ROWS = {
    "prefix_norms": [launch.VECTORS | {"UNIT": 64}],
    "own_candidates": [launch.VECTORS | {"UNIT": 64}],
    "gather_tiles": [launch.GATHER | {"FIRST": first} for first in (False, True)],
    "finish_rows": [FINISH],
    "own_gradients": [FINISH, FINISH | {"dpositive": None}],
    "sum_tiles": [launch.GATHER],
    "finish_gradient": [launch.FINISH | {"UNIT": 64}, launch.FINISH | {"UNIT": 64} | NONE],
}


def types(kernel, dtype):
    """The signature of a kernel for vectors of this dtype."""
    found = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(IDS, "*i32")
    found |= dict.fromkeys(VECTORS, f"*{NAMES[dtype]}") | dict.fromkeys(("absolute", "fraction"), "fp32")
    return found | {"target": "*i64", "valid": "*i1"} | ({"tiles": "i32"} if "TILES" in kernel.arg_names else {})


def compile(kernel, dtype, W_dtype, arch, options, **constants):
    constants |= {name: value for name, value in options.items() if name in kernel.arg_names}
    signature = types(kernel, dtype) | {"weighted": f"*{NAMES[W_dtype]}"}
    stages, warps = options["num_stages"], options["num_warps"]
    machine = sass.compile(kernel, signature, constants, arch, warps, stages, DIVISIBLE)
    bytes_a_stage = (options["BM"] + options["BN"]) * options.get("BE", options.get("BK")) * dtype.itemsize
    whole = sass.opcodes(machine.sass)
    # the loops that add up what earlier ones stored multiply nothing: products are counted in the program as a whole
    counts = {"loops": [{name: sass.counted(whole, name) for name in sass.OPCODES}]}
    # both operands, 16 bytes a thread at a time
    return sass.describe(machine) | counts | {"LDGSTS if all loads are": stages * bytes_a_stage // (16 * 32 * warps)}


def report(case, name, arch, dtype, *arguments, **constants):
    result = compile(*arguments, UNIT=64, **constants)
    print(json.dumps({"kernel": name, "case": case, "dtype": NAMES[dtype], "arch": arch, **result}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=int, nargs="+", default=tuple(sass.SHARED_BYTES), choices=sass.SHARED_BYTES)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    chosen = parser.parse_args()
    for arch in chosen.archs:
        for dtype in map(DTYPES.get, chosen.dtypes):
            W_dtype, product = architecture.product_options(dtype, arch)
            for known, both_ways in itertools.product((False, True), repeat=2):
                for kernel, options in zip(
                    (kernels.forward_tile, kernels.weight_tile),
                    architecture.similarity_tiles(dtype, arch, known or both_ways),
                ):
                    arguments = kernel.fn.__name__, arch, dtype, kernel, dtype, W_dtype, arch, options
                    left_out = {
                        name: None
                        for name in ((() if known else KNOWN) + (() if both_ways else COLUMNS))
                        if name in kernel.arg_names
                    }
                    report(
                        f"7 dims with masks{', several positives' * known}{', both ways' * both_ways}",
                        *arguments,
                        EVEN=True,
                        **left_out,
                    )
                    if dtype != torch.float32 and not (known or both_ways):
                        report(
                            "1 dim",
                            *arguments,
                            EVEN=True,
                            K=1,
                            **left_out,
                            **dict.fromkeys(("limits", "query_group", "document_group")),
                        )
            for side, stride in (("queries", "stride_inner"), ("documents", "stride_row")):
                arguments = kernels.add_product, dtype, W_dtype, arch, product
                report(f"for {side}", "add_product", arch, dtype, *arguments, FIRST=False, **{stride: 1})
        for name, cases in ROWS.items():
            kernel = getattr(rows, name)
            ones = {key: 1 for key in ONE if key in kernel.arg_names and types(kernel, torch.bfloat16)[key] == "i32"}
            ones |= launch._candidates(1) if "C" in kernel.arg_names else {}
            for constants in [*cases, cases[0] | ones]:
                machine = sass.compile(kernel, types(kernel, torch.bfloat16), constants, arch, 4, 3, DIVISIBLE)
                # they multiply no matrices: sass.faults asks none of fp32
                row = {"kernel": name, "case": "rows", "dtype": "fp32", "arch": arch} | sass.describe(machine)
                print(json.dumps(row), flush=True)
