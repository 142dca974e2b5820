"""InfoNCE with the documents of all ranks equals one rank with everything."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conan_kernels import gather_documents


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_one_rank_with_everything(world, tmp_path):
    script = Path(__file__).parents[1] / "info_nce_ranks.py"
    done = subprocess.run(
        [sys.executable, script, str(world), tmp_path, str(torch.randint(2**62, ()).item())],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_one_rank_needs_no_process_group():
    documents = torch.randn(3, 4)
    assert gather_documents(documents) is documents
