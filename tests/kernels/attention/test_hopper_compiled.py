"""The machine code of the kernels in Gluon for sm_90, compiled on any machine: nothing spilled within a loop, shared
memory within its limit, and every exponential of a loop computed while a matrix product is under way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sass


@pytest.fixture(scope="module")
def kernels():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "hopper_compile.py"
    command = [sys.executable, "-W", "ignore", script, "--dims", "64", "112", "128", "--dtypes", "bf16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_nothing_spills_in_a_loop_and_shared_memory_suffices(kernels):
    assert len(kernels) == 6
    for row in kernels:
        assert not sass.faults(row), (sass.faults(row), row)
        assert all(loop["LDL"] == loop["STL"] == 0 for loop in row["loops"]), row


def test_each_loop_has_its_products_and_every_exponential_stands_beside_one(kernels):
    """A consumer has a loop over PLAIN and one over FUTURE tiles, and owns 64 x 128 logits of a tile: 64 a thread."""
    for row in kernels:
        assert len(row["loops"]) == 4, row
        for number, loop in enumerate(row["loops"]):
            future = number % 2
            assert loop["HGMMA"] == row["W"] // 16 + 8 + future, row  # q k^T by W / 16, p v by 128 / 16, the bias
            assert loop["in_flight"] == loop["MUFU"] and 64 <= loop["MUFU"] <= 66, row
            assert loop["BAR"] <= 4, row


def test_a_future_entry_costs_no_instruction_more_than_a_plain_one(kernels):
    """The bias comes with the product: what a thread adds is for its two rows, not for its 64 entries."""
    for row in kernels:
        for plain, future in zip(row["loops"][::2], row["loops"][1::2]):
            for loop in (plain, future):
                entries, rows_of_out = 64, row["W"] // 2
                arithmetic = loop["FFMA"] + loop["FADD"] + loop["FMUL"]
                assert 2 * entries + rows_of_out <= arithmetic <= 2 * entries + rows_of_out + 12, row
                assert loop["FSEL"] == loop["LDG"] == loop["ISETP"] == 0, row
            assert future["instructions"] <= plain["instructions"] + 16, row
