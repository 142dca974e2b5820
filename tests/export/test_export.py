"""`python -m conan_engine.export`: a folder of each form, or one line that says why not."""

import shutil
import subprocess
import sys

import pytest
from runs import ROOT


def export(*arguments, hide=""):
    """hide: a package that this process cannot import."""
    code = (
        f"import runpy, sys; sys.modules[{hide!r}] = None; sys.argv[0] = 'export'; "
        f"runpy.run_module('conan_engine.export', run_name='__main__', alter_sys=True)"
    )
    command = ["-c", code] if hide else ["-m", "conan_engine.export"]
    done = subprocess.run([sys.executable, *command, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("options", "file"),
    [
        (["--instruction=Find"], "model.safetensors"),
        (["--format=gguf", "--dtype=q8_0"], "untrained-q8_0.gguf"),
        pytest.param(["--format=onnx"], "model.onnx", marks=pytest.mark.slow),
    ],
)
def test_each_form(untrained_run, tmp_path, options, file):
    (tmp_path / "out").mkdir()  # an empty one will do
    code, out, err = export(untrained_run, tmp_path / "out", *options)
    assert code == 0 and out.startswith(f"{tmp_path}/out: ") and (tmp_path / "out" / file).stat().st_size > 1000, err
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and err == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format=onnx", "--dtype=float16"], "--dtype is float16; expected float32 for onnx"),
        (["--dtype=q8_0"], "--dtype is q8_0; expected float32 or bfloat16 or float16 for sentence-transformers"),
    ],
)
def test_a_dtype_that_a_form_lacks(untrained_run, tmp_path, options, said):
    code, _, err = export(untrained_run, tmp_path / "out", *options)
    assert (code, err.count("\n")) == (2, 1) and said in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["gguf", "onnx"])
def test_an_instruction_where_there_is_no_place_for_it(untrained_run, tmp_path, form):
    code, _, err = export(untrained_run, tmp_path / "out", f"--format={form}", "--instruction=Find")
    assert (
        (code, err.count("\n")) == (2, 1) and f"{form} has no place for it" in err and not (tmp_path / "out").exists()
    )


def test_a_folder_with_something_in_it_is_left_alone(untrained_run, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for folder in (tmp_path, tmp_path / "mine"):
        code, _, err = export(untrained_run, folder)
        assert (code, err.count("\n")) == (2, 1) and f"{folder}: exists already" in err
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_run_without_a_checkpoint(untrained_run, tmp_path):
    shutil.copy(untrained_run / "tokenizer.model", tmp_path)
    code, _, err = export(tmp_path, tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1) and "no whole checkpoint" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("form", "package"), [("gguf", "gguf"), ("onnx", "onnx"), ("onnx", "onnxscript")])
def test_a_package_that_is_not_there(untrained_run, tmp_path, form, package):
    code, _, err = export(untrained_run, tmp_path / "out", f"--format={form}", hide=package)
    assert (code, err.count("\n")) == (2, 1) and f"pip install {package}" in err and not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written(untrained_run, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = export(untrained_run, tmp_path / "file/out")
    assert (code, err.count("\n")) == (2, 1) and "cannot write it" in err
