"""The kernels with the oldest Triton that the README promises; `make matrix` has all of them, and every size."""

import subprocess
import sys
from pathlib import Path

import pytest

MATRIX = Path(__file__).parent / "matrix.py"


@pytest.mark.slow
def test_the_models_head_dim_compiles_with_the_oldest_triton():
    command = [
        sys.executable,
        MATRIX,
        "--versions",
        "3.6.0",
        "--archs",
        "80",
        "90",
        "--dims",
        "112",
        "--dtypes",
        "bf16",
        "--no-parity",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[:4] for line in done.stdout.splitlines()] == [
        ["triton", "3.6.0", f"sm_{arch}", "holds"] for arch in (80, 90)
    ]
