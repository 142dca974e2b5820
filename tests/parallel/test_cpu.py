import subprocess
import sys

import pytest

from conan_engine.parallel.cpu import multiplies_bfloat16

GROWTH = """
import torch
from conan_engine.parallel.cpu import settle_memory
settle_memory()
weight = torch.randn(256, 256, requires_grad=True)
def step(tokens):
    with torch.autocast("cpu", torch.bfloat16):
        torch.nn.functional.linear(torch.randn(tokens, 256, requires_grad=True), weight).sum().backward()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
step(2000)
before = resident()
for tokens in range(1000, 1100):
    step(tokens)
print(resident() - before)
"""


@pytest.mark.skipif(
    not multiplies_bfloat16(),
    reason="this CPU does not multiply bfloat16: products of it are not what fills its memory",
)
def test_steps_of_ever_other_lengths_take_no_more_memory():
    grown = int(subprocess.run([sys.executable, "-c", GROWTH], check=True, capture_output=True, text=True).stdout)
    assert grown < 80e6  # 22 MB; where the code for every shape is kept, 209 MB
