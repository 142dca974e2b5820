"""The pointwise kernels' machine code for sm_90, compiled on any machine: no spills, and loads of 16 bytes a thread."""

import json
import os
import subprocess
import sys
from pathlib import Path

import sass


def test_nothing_spills_and_loads_are_wide():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", Path(__file__).parents[1] / "pointwise_compile.py", "--archs", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 10
    for row in rows:
        assert not sass.faults(row), row
        assert row["widest_load"] == 128, row
