"""Run by test_info_nce_compiled.py, without Triton's interpreter: compiles the InfoNCE kernels for GPUs that need not be
there, with the launch options that they would have there, and prints what the machine code uses, one JSON a line."""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from conan_kernels import info_nce_tiles as kernels

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
IDS = ("query_group", "document_group", "starts", "tiles")
# what Triton finds divisible by 16 at the paper's shape, beside the pointers
DIVISIBLE = ("E", "N", "M", "whole_M", "R", "C", "first_row", "first_column", "stride_k", "stride_row", "stride_inner")
POINTERS = (
    "queries documents target rq rd temperature limits query_group document_group starts lse best share u_positive weighted "
    "uz_rows uz_columns total vectors tiles"
).split()


def compile(kernel, dtype, W_dtype, capability, options, **constants):
    """{"stack": bytes a thread, "spills": local loads and stores, "registers", then how often each instruction occurs}."""
    constants |= {name: value for name, value in options.items() if name in kernel.arg_names}
    types = dict.fromkeys(POINTERS, "*fp32") | dict.fromkeys(IDS, "*i32") | {"target": "*i64", "weighted": f"*{NAMES[W_dtype]}"}
    types |= dict.fromkeys(("queries", "documents", "vectors"), f"*{NAMES[dtype]}")
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = [name for name in kernel.arg_names if name not in constants and name in (*POINTERS, *DIVISIBLE)]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    launch = {name: options[name] for name in ("num_warps", "num_stages")}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    count = {name: len(re.findall(rf"\b{name}\b", sass)) for name in ("HGMMA", "HMMA", "LDGSTS", "STL", "LDL")}
    used = {name: int(re.search(rf"{key}:(\d+)", usage)[1]) for name, key in (("registers", "REG"), ("stack", "STACK"))}
    bytes_a_stage = (options["BM"] + options["BN"]) * options.get("BE", options.get("BK")) * dtype.itemsize
    whole = launch["num_stages"] * bytes_a_stage // (16 * 32 * launch["num_warps"])  # both operands, 16 bytes a thread at a time
    return used | {"spills": count["STL"] + count["LDL"], "LDGSTS if all loads are": whole} | count


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
