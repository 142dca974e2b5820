"""The InfoNCE kernels' machine code for sm_80 and sm_90, compiled on any machine: no spills, tensor cores, asynchronous
loads. matrix.py looks at the other architectures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sass


@pytest.mark.slow
def test_machine_code_has_no_spills_and_uses_the_tensor_cores():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kernels = []
    for arguments in (["--archs", "80", "90", "--dtypes", "bf16"], ["--archs", "90", "--dtypes", "fp32"]):
        command = [sys.executable, "-W", "ignore", Path(__file__).parents[1] / "info_nce_compile.py", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        kernels += map(json.loads, done.stdout.splitlines())
    products = [kernel for kernel in kernels if kernel["case"] != "rows"]
    assert len(products) == 34 and len(kernels) == 34 + 3 * 17
    for kernel in kernels:
        assert not sass.faults(kernel), (sass.faults(kernel), kernel)
    for kernel in products:
        counts = kernel["loops"][0]
        assert counts["HGMMA" if kernel["arch"] >= 90 else "HMMA"] > 0, kernel
        assert counts["LDGSTS"] == kernel["LDGSTS if all loads are"], kernel  # cp.async, the widest there is
