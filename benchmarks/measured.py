"""By what and where a benchmark's numbers were measured."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import sys
import threading
from pathlib import Path

import torch

from conan_engine.run import versions

commit, processor = versions.commit, versions.processor  # as a run notes them


class Parser(argparse.ArgumentParser):
    """The flags that mean the same in every benchmark.

    --out: the folder for the JSON and the plot. --quick, of a benchmark that has `quick`, {flag: its default then}: a
    minute or so, to see that it runs. --device, of one that has `device`: where it computes, by default on a GPU where
    there is one.
    """

    def __init__(self, doc, quick=None, device=False):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.quick = quick or {}
        self.add_argument(
            "--out", type=Path, default=Path("runs/benchmarks"), metavar="DIR", help="default: %(default)s"
        )
        if quick is not None:
            self.add_argument("--quick", action="store_true", help="a minute or so, to see that it runs")
        if device:
            found = "cuda" if torch.cuda.is_available() else "cpu"
            self.add_argument("--device", choices=("cuda", "cpu"), default=found, help=f"default here: {found}")

    def parse_known_args(self, args=None, namespace=None):
        if "--quick" in (sys.argv[1:] if args is None else args):
            self.set_defaults(**self.quick)
        found, rest = super().parse_known_args(args, namespace)
        if getattr(found, "device", "") == "cuda" and not torch.cuda.is_available():
            self.error("torch sees no GPU; leave --device out, or say cpu")
        return found, rest


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


def queued_seconds(run):
    """The median of what run() takes on the GPU, which waits until the host has queued all of it (10 ms): what the host
    takes is left out, as within a step, where it is far ahead."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = []
    while len(seconds) < 5 or (sum(seconds) < 0.2 and len(seconds) < 20):
        torch.cuda._sleep(20_000_000)  # cycles
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def kernels_of(run, steps=3):
    """[(kernel, calls a run, seconds a run), ...] on the GPU, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    found = [
        (event.key, event.count / steps, event.self_device_time_total / 1e6 / steps)
        for event in profiler.key_averages()
        if event.self_device_time_total
    ]
    return sorted(found, key=lambda kernel: -kernel[2])


class Memory:
    """Within it, how much memory of its own this process has: `before` and `peak`, bytes, without what it maps."""

    def __enter__(self):
        self.before = self.peak = self._now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()

    def _watch(self):
        while not self._ended.wait(0.02):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now():
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


@contextlib.contextmanager
def environment(**variables):
    """These environment variables, within it."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
