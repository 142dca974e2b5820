"""A step's time by the parts of the model."""

import json
import subprocess
import sys

import pytest
from runs import ROOT

CONFIG = """
stages = ["weak"]
precision = "float32"
[model]
layers = 2
width = 64
ffn = 96
heads = 2
kv_heads = 1
context = 64
[tokenizer]
vocab_size = 2048
train_bytes = 300_000
[weak]
data = { docstrings = 1 }
steps = 3
batch = 16
max_tokens = 64
min_score = 0
"""


@pytest.mark.slow
def test_all_products_are_counted_and_every_part_takes_time(tmp_path):
    (tmp_path / "config.toml").write_text(CONFIG)
    command = [sys.executable, ROOT / "benchmarks/where.py", tmp_path / "config.toml", "--device=cpu", "--quick"]
    done = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "where.json").read_text())
    weights, recorded = 2 * (64 * (64 + 64) + 64 * 64 + 3 * 64 * 96), report["recorded"]
    assert recorded["flop"] == 6 * weights * recorded["tokens"]
    by_part = {row["part"]: row for row in report["rows"]}
    for part in ("products", "attention", "SwiGLU", "norms and residual", "RoPE"):
        assert by_part[part]["forward"] > 0 and by_part[part]["backward"] > 0, part
    assert by_part["optimizer"]["forward"] > 0
    whole = sum(row[way] for row in report["rows"] for way in ("forward", "backward"))
    assert 0.3 * recorded["seconds"] < whole < 1.05 * recorded["seconds"]
