"""Two runs in one folder: the second is told who has it; a run that was killed holds nothing."""

import os
import signal
import socket
import stat

import pytest
from runs import one_line, start, train

from conan_engine.errors import UserError
from conan_engine.run import lock


def test_the_second_is_told_who_holds_it_until_that_one_lets_go(tmp_path):
    held = lock.hold(tmp_path / "run")
    with pytest.raises(
        UserError, match=f"run: process {os.getpid()} on host {socket.gethostname()} is training in this folder"
    ):
        lock.hold(tmp_path / "run")
    held.close()
    lock.hold(tmp_path / "run").close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file/run: cannot write here .*; choose another out_dir"):
        lock.hold(tmp_path / "file" / "run")


def test_a_file_system_without_locks_gets_a_line(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    lock.hold(tmp_path / "run").close()
    assert "run: cannot be locked (No locks available)" in capsys.readouterr().out


def test_a_second_run_gets_one_line_and_changes_nothing_and_kill_9_frees_the_folder(tiny, tmp_path):
    run = tmp_path / "run"
    first = start(tiny, run, "--stages=['pretrain']", linger="conan_engine.data.build:make_shards")
    while first.stdout.readline() != "lingering\n":
        pass
    first.send_signal(signal.SIGSTOP)  # it shall write nothing while the second starts, however long that takes
    before = contents(run)
    one_line(
        train(tiny, run, "--stages=['pretrain']", "--seed=2"),
        f"process {first.pid} on host {socket.gethostname()} is training in this folder",
    )
    assert contents(run) == before
    first.kill()  # while it prepares data on other processes
    first.communicate(timeout=20)
    code, _, err = train(tiny, run, "--stages=['pretrain']")
    assert code == 0, err


def contents(run):
    """Everything but what the first run itself is writing."""
    files = [path for path in run.rglob("*") if stat.S_ISREG(path.stat().st_mode) and "data" not in path.parts]
    return {path: path.read_bytes() for path in files}
