"""By what and where a benchmark's numbers were measured."""

import contextlib
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch


def commit():
    """Of the code, "-dirty" where it is not as committed; empty outside a repository."""
    return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def processor():
    """What the processor calls itself, where Linux says it."""
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1].strip()
    except (OSError, TypeError):
        return platform.machine()


def machine(device):
    """The GPU's name, or the processor's and how many threads compute."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"


def versions(*packages):
    """{package: its version, None where it is not installed}"""
    found = dict.fromkeys(packages)
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
