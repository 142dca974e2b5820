"""What lengths.py measures."""

import argparse

import lengths
import pytest


@pytest.mark.parametrize("kind", ["16", "64", "log-normal"])
def test_a_batch_has_its_tokens(kind):
    found = lengths.lengths_of(kind, 4096)
    assert sum(found) == 4096 and (len(set(found)) > 5) == (kind == "log-normal")


def test_a_row_says_the_parts_and_the_memory_of_real_steps(monkeypatch):
    monkeypatch.setattr(lengths, "STEPS", 1)
    options = argparse.Namespace(device="cpu", tokens=512, chunk=8, chunk_tokens=130, alpha=0.5, layers=1, width=32)
    found = {key: lengths.row("16", key, options) for key in ("chunk", "chunk_tokens")}
    assert [found[key]["parts"] for key in found] == [4, 4]
    assert found["chunk"]["count"] == 32 and found["chunk"]["longest"] == 16
    assert all(
        row["peak_bytes"] > 2**27 and row["planned_bytes"] > 2**27 and row["seconds"] > 0 for row in found.values()
    )
