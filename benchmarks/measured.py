"""By what and where a benchmark's numbers were measured."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch


def commit():
    """Of the code, "-dirty" where it is not as committed; outside a repository what CONAN_COMMIT says."""
    if "CONAN_COMMIT" in os.environ:
        return os.environ["CONAN_COMMIT"]
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()


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


class Rows:
    """A results file of one JSON object, `rows` among its keys, written anew after each row: what was measured is kept
    whatever comes. Started again with the same `about` (commit, machine, settings), it goes on behind the rows that are
    there."""

    def __init__(self, path, about):
        self.path, self.report = Path(path), {**about, "rows": []}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if {key: found.get(key) for key in about} == json.loads(json.dumps(about)):
                self.report = found

    def __iter__(self):
        return iter(self.report["rows"])

    def find(self, **known):
        """The row with these values, or None."""
        return next((row for row in self if all(row.get(key) == value for key, value in known.items())), None)

    def add(self, row):
        self.report["rows"].append(row)
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(json.dumps(self.report, indent=1), encoding="utf-8")
        partial.replace(self.path)
