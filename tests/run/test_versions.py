"""What a run notes of its starts."""

import json
import subprocess

import torch

from conan_engine.parallel.mesh import Mesh
from conan_engine.run import versions


def test_each_start_has_a_line_with_versions_devices_and_command(tmp_path):
    assert versions.noted(tmp_path) == []
    mesh = Mesh("cpu")
    versions.note(tmp_path, mesh)
    versions.note(tmp_path, mesh)
    with open(tmp_path / versions.FILE, "a") as file:
        file.write('{"time": "2026')  # a start that was killed as it wrote
    first, second = versions.noted(tmp_path)
    assert first["torch"] == torch.__version__ and first["ranks"] == 1 and first["command"] == second["command"]
    assert first["device"] == versions.processor() and first["cuda"] is None and json.dumps(first)


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("CONAN_COMMIT", "abc")  # a copy without its .git
    assert versions.commit() == "abc"
    monkeypatch.delenv("CONAN_COMMIT")
    module = tmp_path / "conan_engine/run/versions.py"
    monkeypatch.setattr(versions, "__file__", str(module))
    assert versions.commit() is None  # installed from a wheel
    (tmp_path / ".git").mkdir()
    assert versions.commit() is None  # a checkout that git does not read
    (tmp_path / ".git").rmdir()
    run = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*run, "init", "-q"], check=True)
    module.parent.mkdir(parents=True)
    module.write_text("1")
    subprocess.run([*run, "add", "."], check=True)
    subprocess.run([*run, "commit", "-q", "-m", "a"], check=True)
    clean = versions.commit()
    assert clean and len(clean) >= 7
    module.write_text("2")
    assert versions.commit() == f"{clean}-dirty"
