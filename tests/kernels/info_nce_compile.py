"""Run by test_info_nce_compiled.py, without Triton's interpreter: compiles the InfoNCE kernels for GPUs that need not be
there, with the launch options that they would have there, and prints what the machine code uses, one JSON a line."""

import json

import sass
import torch

from conan_kernels import info_nce_tiles as kernels

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
IDS = ("query_group", "document_group", "starts", "tiles")
# what Triton finds divisible by 16 at the paper's shape, beside the pointers
DIVISIBLE = ("E", "N", "M", "whole_M", "R", "C", "first_row", "first_column", "stride_k", "stride_row", "stride_inner")
FLOATS = "rq rd temperature limits lse best share u_positive uz_rows uz_columns total".split()


def compile(kernel, dtype, W_dtype, capability, options, **constants):
    constants |= {name: value for name, value in options.items() if name in kernel.arg_names}
    signature = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(IDS, "*i32")
    signature |= dict.fromkeys(("queries", "documents", "vectors"), f"*{NAMES[dtype]}")
    signature |= {"target": "*i64", "weighted": f"*{NAMES[W_dtype]}"}
    stages, warps = options["num_stages"], options["num_warps"]
    machine = sass.compile(kernel, signature, constants, capability, warps, stages, DIVISIBLE)
    bytes_a_stage = (options["BM"] + options["BN"]) * options.get("BE", options.get("BK")) * dtype.itemsize
    return {
        "stack": machine.stack,
        "spills": machine.spills,
        "registers": machine.registers,
        "HGMMA": machine.count("HGMMA"),
        "HMMA": machine.count("HMMA"),
        "LDGSTS": machine.count("LDGSTS"),
        "LDGSTS if all loads are": stages * bytes_a_stage // (16 * 32 * warps),  # both operands, 16 bytes a thread at a time
    }


def report(name, dtype, capability, *arguments, **constants):
    result = compile(*arguments, UNIT=64, **constants)
    print(json.dumps({"name": f"{name}, {NAMES[dtype]}, sm_{capability}", "capability": capability, **result}), flush=True)


if __name__ == "__main__":
    unmasked = {"limits": None, "query_group": None, "document_group": None, "K": 1}
    for capability, dtype in ((90, torch.bfloat16), (80, torch.bfloat16), (90, torch.float32)):
        tiles = kernels.tile_options(dtype, capability // 10)
        W_dtype, product = kernels.product_options(dtype, capability // 10)
        for kernel, options in zip((kernels.forward_tile, kernels.weight_tile), tiles):
            name = kernel.fn.__name__
            report(f"{name} of 7 dims with masks", dtype, capability, kernel, dtype, W_dtype, capability, options, EVEN=True)
            if dtype == torch.bfloat16:
                report(f"{name} of 1 dim", dtype, capability, kernel, dtype, W_dtype, capability, options, EVEN=True, **unmasked)
        for side, stride in (("queries", "stride_inner"), ("documents", "stride_row")):
            arguments = kernels.add_product, dtype, W_dtype, capability, product
            report(f"add_product for {side}", dtype, capability, *arguments, **{stride: 1})
