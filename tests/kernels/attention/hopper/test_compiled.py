"""The machine code of the kernels in Gluon for sm_90, compiled on any machine: nothing spilled within a loop, shared
memory within its limit, and every exponential of a loop computed while a matrix product is under way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sass

ENTRIES = {"forward_blocks": 64, "dq_blocks": 32, "dk_dv_blocks": 32}  # of a tile's logits, that a thread owns


@pytest.fixture(scope="module", params=[["112"], pytest.param(["64", "128"], marks=pytest.mark.slow)], ids=str)
def kernels(request):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[2] / "hopper_compile.py"
    command = [sys.executable, "-W", "ignore", script, "--dims", *request.param, "--dtypes", "bf16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def of(kernels, name):
    rows = [row for row in kernels if row["kernel"] == name]
    assert len(rows) in (2, 4)  # one or two dims, two forms of the mask
    return rows


def test_no_loop_spills_or_overwrites_a_factor_and_shared_memory_suffices(kernels):
    """With 3.9 the loops of the backward kernels read up to four numbers from it that were written before the loop."""
    for row in kernels:
        assert not sass.faults(row), (sass.faults(row), row)
        most = {"forward_blocks": 0, "dq_blocks": 1, "dk_dv_blocks": 4}[row["kernel"]]
        assert all(loop["STL"] == 0 and loop["LDL"] <= most for loop in row["loops"]), row


def test_every_exponential_stands_beside_a_product(kernels):
    for row in kernels:
        for loop in row["loops"]:
            assert loop["in_flight"] == loop["MUFU"] >= ENTRIES[row["kernel"]], row
            assert loop["BAR"] <= 4, row


def test_each_loop_of_the_forward_kernel_has_its_products(kernels):
    """A consumer has a loop over PLAIN and one over FUTURE tiles, and owns 64 x 128 logits of a tile: 64 a thread."""
    for row in of(kernels, "forward_blocks"):
        assert len(row["loops"]) == 4, row
        for number, loop in enumerate(row["loops"]):
            future = number % 2
            assert loop["HGMMA"] == row["D"] // 16 + 8 + future, row  # q k^T by D / 16, p v by 128 / 16, the bias
            assert loop["MUFU"] <= 66, row


def test_a_loop_of_the_backward_kernels_has_its_products_and_three_forms_of_the_weights(kernels):
    """No product multiplies zeros of a padded head dim: each has D / 16 steps, or 64 / 16 of 64 rows or columns."""
    for row in of(kernels, "dq_blocks"):
        assert [loop["HGMMA"] for loop in row["loops"]] == [2 * row["D"] // 16 + 4] * 2, row
        assert all(loop["MUFU"] == 3 * 32 for loop in row["loops"]), row  # PLAIN, MIXED, FUTURE
    for row in of(kernels, "dk_dv_blocks"):
        assert [loop["HGMMA"] for loop in row["loops"]] == [2 * row["D"] // 16 + 8] * 2, row
        forms = 2 if row["by_row"] else 3  # by row, what closes the future comes with the row's lse
        assert all(loop["MUFU"] == forms * 32 for loop in row["loops"]), row


def test_a_future_entry_costs_no_instruction_more_than_a_plain_one(kernels):
    """The bias comes with the product: what a thread adds is for its two rows, not for its 64 entries."""
    for row in of(kernels, "forward_blocks"):
        for plain, future in zip(row["loops"][::2], row["loops"][1::2]):
            for loop in (plain, future):
                entries, rows_of_out = 64, row["W"] // 2
                arithmetic = loop["FFMA"] + loop["FADD"] + loop["FMUL"]
                assert 2 * entries + rows_of_out <= arithmetic <= 2 * entries + rows_of_out + 12, row
                assert loop["FSEL"] == loop["LDG"] == loop["ISETP"] == 0, row
            assert future["instructions"] <= plain["instructions"] + 16, row
