"""What tests share: a config small enough for them, on text that is real (docstrings of the standard library)."""

import ast
import fcntl
import os
import zlib
from pathlib import Path

if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers have the cores; what they start inherits it

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, hence before any test imports one
from runs import TINY, train, untrained, write_lines

SEED = int(os.environ.get("CONAN_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))


def pytest_report_header():
    return f"CONAN_TEST_SEED={SEED} draws the same random inputs again"


@pytest.fixture(autouse=True)
def fresh_inputs(request):
    """torch alone would draw the same numbers in every run."""
    torch.manual_seed(SEED ^ zlib.crc32(request.node.nodeid.encode()))


def once(tmp_path_factory, name, make):
    """The folder `name`, which make(folder) has filled: once, by the worker that comes first. Nobody changes it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / name
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / f"{name}.made").exists():
            folder.mkdir()
            make(folder)
            (base / f"{name}.made").touch()
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A config file of all four stages, with its data beside it."""
    return once(tmp_path_factory, "tiny", write_tiny) / "tiny.toml"


def write_tiny(folder):
    docs = []
    for module in ("json", "collections", "asyncio", "email", "logging"):
        for path in sorted(Path(ast.__file__).parent.joinpath(module).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    summary, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
                    if rest.strip():
                        docs.append((module, summary, rest))
    assert len(docs) > 100
    write_lines(folder / "text.jsonl", ({"text": f"{s}\n\n{r}"} for _, s, r in docs))
    write_lines(
        folder / "instruction.jsonl", ({"instruction": "Explain.", "input": s, "output": r} for _, s, r in docs)
    )
    write_lines(
        folder / "pairs.jsonl",
        (
            {
                "query": s,
                "pos": [r, docs[i - 2][2]] if i % 4 == 0 else [r],
                "neg": [docs[i - 1][2]] if i % 3 == 0 else [],
            }
            for i, (_, s, r) in enumerate(docs)
        ),
    )
    write_lines(folder / "label.jsonl", ({"text": s, "label": f"{m} {s[:1]}"} for m, s, _ in docs))
    write_lines(
        folder / "sts.jsonl",
        ({"sentence1": s, "sentence2": docs[i - i % 2][2], "score": 1.0 - i % 2} for i, (_, s, _) in enumerate(docs)),
    )
    (folder / "tiny.toml").write_text(TINY.format(folder=folder))


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory):
    """An uninterrupted run of all four stages."""

    def make(folder):
        code, _, err = train(tiny, folder / "run")
        assert code == 0, err

    return once(tmp_path_factory, "whole", make) / "run"


@pytest.fixture(scope="session")
def untrained_run(tiny, tmp_path_factory):
    """A run folder with a checkpoint of a model as it was drawn."""
    return once(tmp_path_factory, "runs", lambda folder: untrained(tiny, folder / "untrained")) / "untrained"


def pytest_collection_modifyitems(items):
    """What needs a GPU is skipped where there is none, and says so."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; torch sees none"))
