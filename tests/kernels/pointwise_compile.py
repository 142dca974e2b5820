"""Run by test_pointwise_compiled.py and matrix.py, without Triton's interpreter: compiles the pointwise kernels at the
1.4B model's shape for GPUs that need not be there, and prints what the machine code uses, one JSON a line.

    python tests/kernels/pointwise_compile.py [--archs 90 ...]
"""

import argparse
import json

import sass

from conan_kernels.pointwise import api, tiles

ROW = api._row(3584)
# kernel: (launch options, as kernels/pointwise/api.py has them; dtypes of pointers, "i32" what is not listed)
ARGUMENTS = {
    "rms_norm_row": (
        ROW,
        {
            "x": "*fp32",
            "y": "*bf16",
            "total": "*fp32",
            "weight": "*bf16",
            "out": "*bf16",
            "inverse": "*fp32",
            "eps": "fp32",
        },
    ),
    "rms_norm_gradients": (
        ROW,
        dict.fromkeys(("x", "inverse", "dtotal", "dx", "dweight"), "*fp32")
        | dict.fromkeys(("weight", "dout", "dy"), "*bf16"),
    ),
    "rotate_token": (
        {"N": 48, "TURNED": 40, "HALF": 56, "BLOCK": 64, "HEADS": 16},
        {"x": "*bf16", "cos": "*fp32", "sin": "*fp32", "out": "*bf16", "sign": "fp32"},
    ),
    "swiglu_row": ({"BLOCK": 1024}, {"gate_up": "*bf16", "out": "*bf16"}),
    "swiglu_gradients": ({"BLOCK": 1024}, {"gate_up": "*bf16", "dout": "*bf16", "dgate_up": "*bf16"}),
    "sum_sequence": ({"BLOCK": 128, "num_warps": 1}, {"x": "*fp32", "cu_seqlens": "*i32", "out": "*fp32"}),
    "softmax_row": ({"BLOCK": 4096, "num_warps": 8}, {"logits": "*bf16", "peak": "*fp32", "total": "*fp32"}),
    "softmax_gradient": ({"BLOCK": 4096, "num_warps": 8}, {"logits": "*bf16", "lse": "*fp32", "target": "*i64"}),
    "add_part": ({"FIRST": False, "BLOCK": 2048}, {"total": "*fp32", "part": "*bf16", "factor": "*fp32"}),
    "adamw_part": (
        {"BLOCK": 1024, "WHOLE": True},
        dict.fromkeys(("weight", "gradient", "mean", "square"), "*fp32")
        | {"rounded": "*bf16"}
        | dict.fromkeys(("scale", "kept", "beta1", "rest1", "beta2", "rest2", "rate", "root", "eps"), "fp32"),
    ),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=int, nargs="+", default=tuple(sass.SHARED_BYTES), choices=sass.SHARED_BYTES)
    for arch in parser.parse_args().archs:
        for name, (options, dtypes) in ARGUMENTS.items():
            kernel = getattr(tiles, name)
            constants = {key: value for key, value in options.items() if key != "num_warps"}
            signature = dict.fromkeys(kernel.arg_names, "i32") | dtypes
            machine = sass.compile(
                kernel, signature, constants, arch, options.get("num_warps", 4), 3, ("C", "F", "V", "stride", "n")
            )
            # of a thread, in bits
            widest = max(
                (
                    int(part)
                    for name in sass.opcodes(machine.sass)
                    if name.startswith("LDG")
                    for part in name.split(".")
                    if part.isdigit()
                ),
                default=32,
            )
            print(
                json.dumps(
                    {"kernel": name, "dtype": "fp32", "arch": arch, "widest_load": widest} | sass.describe(machine)
                ),
                flush=True,
            )
