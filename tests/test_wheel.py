"""The wheel, installed into a fresh environment, does in an empty folder what a checkout does."""

import json
import os
import subprocess
import sys
import venv

import pytest
from conftest import once, write_tiny
from runs import ROOT, write_lines

pytestmark = pytest.mark.slow


def called(*command, folder, path, timeout=300):
    """What the command prints, in a folder and an environment without anything of this checkout."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL"))}
    environment["PATH"] = f"{path}:{os.environ['PATH']}"
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """(an empty folder, the programs of an environment that holds the wheel and what it asks for)."""
    return tmp_path_factory.mktemp("empty"), once(tmp_path_factory, "wheel", install) / "environment/bin"


def install(home):
    subprocess.run(["make", "-o", ".venv/ready", "wheel"], cwd=ROOT, check=True, timeout=600)
    (wheel,) = (ROOT / "build/wheel").glob("*.whl")
    venv.create(home / "environment", with_pip=True)
    programs = home / "environment/bin"
    pip = [programs / "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    called(*pip, "torch", folder=home, path=programs, timeout=900)
    called(*pip, f"conan-engine[cpu] @ {wheel.as_uri()}", folder=home, path=programs, timeout=900)


@pytest.fixture(scope="module")
def trained(fresh, tmp_path_factory):
    """(the folder, a command's output from there) after a run by conan-train."""
    folder, programs = fresh
    data = tmp_path_factory.mktemp("data")
    write_tiny(data)

    def run(*command):
        return called(*command, folder=folder, path=programs)

    run("conan-prepare", data / "tiny.toml", "--out_dir=run")
    said = run("conan-train", data / "tiny.toml", "--out_dir=run")
    assert "done: run/checkpoints" in said and "report: run/report.html" in said
    return folder, run, data


def test_it_is_the_installed_package_that_is_imported(fresh):
    folder, programs = fresh
    found = called(
        programs / "python", "-c", "import conan_engine; print(conan_engine.__file__)", folder=folder, path=programs
    )
    assert str(programs.parent) in found and str(ROOT) not in found


def test_the_configs_come_with_it(fresh):
    folder, programs = fresh
    said = called("conan-train", "conan-1.4b", "--plan_only=true", folder=folder, path=programs)
    assert "parameters" in said
    assert not list(folder.iterdir())


def test_every_command_has_its_help(fresh):
    folder, programs = fresh
    commands = sorted(path.name for path in programs.glob("conan-*"))
    assert len(commands) == 10
    for command in commands:
        assert "conan" in called(command, "--help", folder=folder, path=programs)
        assert called(command, "--version", folder=folder, path=programs).startswith("conan-engine ")


def test_ranks_are_started_by_torchrun(trained):
    _, run, data = trained
    options = ["--standalone", "--nproc_per_node=2", "-m", "conan_engine.train"]
    said = run("torchrun", *options, data / "tiny.toml", "--out_dir=both", "--stages=['weak']", "--log_to=[]")
    assert "done: both/checkpoints" in said


def test_a_run_is_used_by_the_other_commands(trained):
    folder, run, _ = trained
    queries = write_lines(folder / "queries.jsonl", [{"_id": "q", "text": "parse a date"}])
    corpus = write_lines(
        folder / "corpus.jsonl", [{"_id": str(i), "text": text} for i, text in enumerate(("dates", "numbers"))]
    )
    (folder / "judged.tsv").write_text("q\t0\t1\n")
    run("conan-evaluate", "run", "--queries", queries, "--corpus", corpus, "--qrels", "judged.tsv")
    assert json.loads((folder / "run/retrieval-queries.json").read_text())["documents"] == 2
    assert "run/report.html" in run("conan-report", "run")
    (folder / "texts.txt").write_text("one\ntwo\n")
    run("conan-encode", "run", "texts.txt", "vectors.npy")
    assert (folder / "vectors.npy").exists()
    run("conan-export", "run", "model")
    assert (folder / "model/model.safetensors").exists()
    found = run("conan-search", "run", "sort a list", "--count=3")  # the documentation that is installed there
    assert found.count("site-packages/") == 3


def test_the_version_is_one_that_pip_sorts(fresh):
    folder, programs = fresh
    version = called("conan-report", "--version", folder=folder, path=programs).split()[1]
    script = f"from packaging.version import Version; assert Version({version!r}) > Version('0.0.1')"
    subprocess.run([sys.executable, "-c", script], check=True)
