"""What the commands have in common: their names as programs, --help and --version."""

import importlib
from importlib import metadata

import pytest

import conan_engine
from conan_engine import command

PROGRAMS = [
    of.name
    for of in metadata.distribution("conan-engine").entry_points
    if of.group == "console_scripts" and of.value == "conan_engine.command:script"
]


def test_every_command_is_a_program():
    folder = importlib.resources.files(conan_engine)
    modules = {path.name.removesuffix(".py") for path in folder.iterdir() if path.name.endswith(".py")}
    commands = {name for name in modules if "command.run(main)" in (folder / f"{name}.py").read_text()}
    packages = {path.name for path in folder.iterdir() if (path / "__main__.py").exists()}
    assert {name.removeprefix("conan-") for name in PROGRAMS} == commands | packages


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_runs_the_module_of_its_name(program, monkeypatch, capsys):
    for option, said in (("--version", f"conan-engine {conan_engine.__version__}"), ("--help", "Example")):
        monkeypatch.setattr("sys.argv", [f"/somewhere/{program}", option])
        try:
            command.script()
        except SystemExit as end:
            assert end.code == 0
        out = capsys.readouterr().out
        assert said in out and (option == "--version" or max(map(len, out.splitlines())) <= 80)


def test_one_rank_answers(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--help"])
    monkeypatch.setenv("RANK", "1")
    assert command.answered("about") and capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert command.answered("about", "more") and capsys.readouterr().out == "about\nmore\n"
    monkeypatch.setattr("sys.argv", ["train.py", "--weak.lr=1"])
    assert not command.answered("about") and capsys.readouterr().out == ""
