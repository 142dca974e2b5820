"""The InfoNCE kernels' machine code for sm_80 and sm_90, compiled on any machine: no spills, tensor cores, asynchronous loads."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_machine_code_has_no_spills_and_uses_the_tensor_cores():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", Path(__file__).parent / "info_nce_compile.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 16
    for kernel in kernels:
        assert kernel["stack"] == kernel["spills"] == 0, kernel
        assert kernel["HGMMA" if kernel["capability"] >= 90 else "HMMA"] > 0, kernel
        assert kernel["LDGSTS"] == kernel["LDGSTS if all loads are"], kernel  # cp.async, the widest there is
