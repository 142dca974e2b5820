"""Work on several processes: in order, and what happens when one of them, or the first one, ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from conan_engine.data.sources.processes import Pool
from conan_engine.errors import UserError


def test_results_come_in_order_and_from_other_processes():
    def slow_first(i):
        time.sleep(0.3 if i == 0 else 0.0)
        return i, os.getpid()

    with Pool(3) as pool:
        found = list(pool.map(slow_first, range(20)))
    assert [i for i, _ in found] == list(range(20))
    assert 2 <= len({pid for _, pid in found} - {os.getpid()}) <= 3


def test_items_are_taken_only_as_they_are_worked_on():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    with Pool(2) as pool:
        results = pool.map(abs, items())
        assert next(results) == 0 and len(taken) == 4


def test_what_the_function_or_the_items_raise_is_raised_here():
    def items():
        yield from range(9)
        raise UserError("file.jsonl: line 10: broken")

    with Pool(2) as pool:
        with pytest.raises(ZeroDivisionError):
            list(pool.map((1).__floordiv__, [1, 0]))
        with pytest.raises(UserError, match="line 10"):
            list(pool.map(abs, items()))
        assert list(pool.map(abs, [-1])) == [1]


def test_a_killed_process_is_one_line():
    with Pool(2) as pool, pytest.raises(UserError, match="one of 2 processes that prepare data was killed"):
        list(pool.map(os._exit, [1, 1, 1]))


WAITS = r"""
import os, time
from conan_engine.data.sources.processes import Pool

def wait(_):
    os.write(1, b"%d\n" % os.getpid())  # a line whole: print's two parts may mix with the other process'
    time.sleep(0.5)

list(Pool(2).map(wait, range(100)))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_none_outlives_the_first_process(how):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    children = [int(process.stdout.readline()) for _ in range(2)]
    # Ctrl-C reaches all, kill -9 the first alone
    os.killpg(process.pid, how) if how == signal.SIGINT else process.kill()
    until = time.monotonic() + 20
    while any(map(runs, children)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(runs, children))
    process.communicate(timeout=20)


def runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
