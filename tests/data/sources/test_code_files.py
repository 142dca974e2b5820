"""Source code as text: whole files, each once, of no held-out package and none that a program wrote."""

import sysconfig

import pytest

from conan_engine.data.sources import code_files, installed


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """An empty site-packages."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def body(name, lines=40):
    return "\n".join(f"def {name}_{i}(x):\n    return x + {i}" for i in range(lines))


def test_whole_files_each_once(packages):
    write(packages / "zoo/__init__.py", "short = 1\n")
    write(packages / "zoo/core.py", f"{body('core')}\n\n")
    write(packages / "zoo/copy.py", body("core"))
    write(packages / "zoo/data.py", f"table = [{'1234567, ' * 500}]")
    write(packages / "zoo/large.py", body("large", 10_000))
    write(packages / "zoo/other.py", body("é").encode("latin-1"))
    write(packages / "zoo/tests/test_core.py", body("test"))
    write(packages / "zoo/vendor/networkx/graph.py", body("graph"))
    write(packages / "zoo/last.py", body("last"))
    assert list(code_files.read(["zoo"], ["networkx"])) == [("zoo.copy", body("core")), ("zoo.last", body("last"))]
    assert [file.module for file in code_files.read(["zoo"])][-1] == "zoo.vendor.networkx.graph"


def test_each_file_is_trained_on_or_kept_for_validation(packages):
    for i in range(300):
        write(packages / f"zoo/m{i}.py", body(f"name{i}", 20))
    train, kept = ({file.text for file in installed.code(validation, ("zoo",))} for validation in (False, True))
    assert not train & kept and len(train | kept) == 300 and 0 < len(kept) < 30


def test_library_source_reads_what_library_does():
    names = {name for name, kind in installed.READERS if kind == "text"}
    assert {"docstrings.source", "library.source", "library.source.validation"} <= names
    of = installed.READERS["library.source", "text"].args[1]
    assert set(of.keywords["packages"]) == set(installed.TRAINING_PACKAGES + installed.MORE_PACKAGES)
    assert not set(of.keywords["packages"]) & set(installed.HELD_OUT_PACKAGES)
