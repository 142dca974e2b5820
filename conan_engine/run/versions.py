"""What a run was trained with: RUN/starts.jsonl has a line for each start."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conan_engine import __version__
from conan_engine.run.log import rows

if TYPE_CHECKING:
    from conan_engine.parallel.mesh import Mesh

FILE = "starts.jsonl"
PACKAGES = ("torch", "triton", "numpy", "sentencepiece", "tokenizers")


def note(run: str | Path, mesh: Mesh) -> None:
    """Add a line for this start: time, versions, commit, devices, command."""
    with open(Path(run, FILE), "a", encoding="utf-8") as file:
        file.write(json.dumps(_of_this_process(mesh)) + "\n")


def noted(run: str | Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first; none for a run of a version that wrote no such file."""
    path = Path(run, FILE)
    return rows(path) if path.exists() else []


def commit() -> str | None:
    """The commit of the checkout that this code is in, with "-dirty" if files have changed; outside one, what the
    environment variable CONAN_COMMIT says, or None.
    """
    if "CONAN_COMMIT" in os.environ:
        return os.environ["CONAN_COMMIT"]
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of somebody else
        return None


def processor() -> str:
    """What the processor calls itself, where Linux says it."""
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1].strip()
    except (OSError, TypeError):
        return platform.machine()


def _of_this_process(mesh):
    cuda = mesh.device.type == "cuda"
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "conan-engine": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda if cuda else None,
        "device": torch.cuda.get_device_name(mesh.device) if cuda else processor(),
        "ranks": mesh.world,
        "tensor_parallel": mesh.tensor.world,
        "command": sys.argv,
    }


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
