"""The scripts for a GPU, rehearsed without one in their tiny form."""

import json
import os
import subprocess
import sys

import pytest
from runs import ROOT


def rehearse(script, out, *arguments, **environment):
    command = ["bash", ROOT / "benchmarks/gpu" / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env={**os.environ, "OUT": str(out), "PYTHON": sys.executable, **environment})
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_attention_stops_in_time_and_goes_on(tmp_path):
    code, said = rehearse("attention.sh", tmp_path, "--device", "cpu", MOST="30")
    assert code == 1 and "failed: attention" in said, said
    first = json.loads((tmp_path / "attn.json").read_text())["rows"]
    code, said = rehearse("attention.sh", tmp_path, "--device", "cpu", MINUTES="4")
    rows = json.loads((tmp_path / "attn.json").read_text())["rows"]
    assert code == 0 and len(rows) > len(first) > 0 and rows[: len(first)] == first, said
    assert all(row["difference"] < 1e-4 for row in rows)
