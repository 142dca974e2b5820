"""The soft-masked attention's machine code for sm_80 and sm_90, compiled on any machine: no spills, shared memory
within the limits, tensor cores in every loop, and in the loop over PLAIN tiles nothing that a mask would cost. A few
configurations: matrix.py compiles all that ship, for all architectures, with several versions of Triton."""

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
    command = [sys.executable, "-W", "ignore", Path(__file__).parents[1] / "soft_mask_compile.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 16
    return rows


def name(row):
    return {key: row[key] for key in ("kernel", "D", "dtype", "arch", "by_row")}


def loops_of_half_precision(kernels):
    """(row, PLAIN, MIXED and FUTURE loop, matrix entries that a thread owns in a tile)."""
    for row in kernels:
        if row["dtype"] != "fp32":
            options = row["options"]
            assert len(row["loops"]) == 3, name(row)
            yield row, *row["loops"], options["BM"] * options["BN"] // (32 * options["num_warps"])


def test_nothing_spills_shared_memory_suffices_and_every_loop_uses_the_tensor_cores(kernels):
    for row in kernels:
        assert not sass.faults(row), (sass.faults(row), row)


def arithmetic_of_a_plain_tile(row, entries):
    """FFMA, FADD and FMUL that a thread needs. Forward: scale * s - peak and the sum of the row for each entry, and
    each entry of out made smaller. Backward: scale * s - lse, dp - delta and its product with p for each entry; in
    dk_dv log2(e) * lse for each row too."""
    options = row["options"]
    if row["kernel"] == "forward_block":
        return 2 * entries + options["BM"] * options["W"] // (32 * options["num_warps"])
    return 3 * entries + (options["BM"] // 4 if row["kernel"] == "dk_dv_block" else 0)


def test_the_plain_loop_holds_no_bias_arithmetic(kernels):
    """A mask costs one instruction more for each entry, and an FSEL more at the diagonal. The three kinds are counted
    together, since versions of the compiler differ in which products and sums they fuse. That the loops agree with this
    count also says that no two threads compute the same entry."""
    for row, plain, mixed, future, entries in loops_of_half_precision(kernels):
        needed, rows = arithmetic_of_a_plain_tile(row, entries), row["options"]["BM"] // 4
        few = 12  # for each row, not for each entry: the running maximum, the sum across threads
        for loop, least in ((plain, needed), (mixed, needed + entries), (future, needed + entries)):
            assert least <= loop["FFMA"] + loop["FADD"] + loop["FMUL"] <= least + few, row
            assert entries <= loop["MUFU"] <= entries + 8, row
        # in dk_dv what closes the rows past the end
        assert plain["FSEL"] <= (rows if row["kernel"] == "dk_dv_block" else 0), row
        assert mixed["FSEL"] >= plain["FSEL"] + entries, row
        assert min(mixed["instructions"], future["instructions"]) > plain["instructions"], row
