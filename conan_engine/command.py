"""What every command has in common: its --help, and how it ends where something is wrong."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import select
import sys
from collections.abc import Callable
from pathlib import Path

from conan_engine import __version__
from conan_engine.errors import Stopped, UserError
from conan_engine.parallel import watch


def run(main: Callable[[], None]) -> None:
    """Call `main()`. A UserError ends as one line on stderr and exit code 2, without a traceback.

    Stopped ends with 143, Ctrl-C with 130. os._exit is used because a rank that ends must not wait in a destructor for
    peers that are blocked in a collective; the launcher ends those.
    """
    try:
        main()
    except UserError as error:
        code, line = 2, str(error) and f"error: {error}"
    except Stopped as stopped:
        code, line = 143, str(stopped)
    except KeyboardInterrupt:
        code, line = 130, "interrupted"
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os._exit(141)  # as a process that SIGPIPE ends
    except RuntimeError as error:
        if watch.another_ended(error):
            line = "another rank has ended"
        elif watch.timed_out(error):
            line = f"a collective has waited for {watch.waited_for()}; ending"
        else:
            raise
        code, line = 1, f"rank {os.environ.get('RANK')}: {line}"
    else:
        return
    sys.stdout.flush()
    if line:
        print(line, file=sys.stderr, flush=True)
    os._exit(code)


def script() -> None:
    """Run the command that this process was started as: conan-encode runs conan_engine.encode."""
    name = Path(sys.argv[0]).name.removeprefix("conan-")
    module = importlib.import_module(f"conan_engine.{name}")
    if hasattr(module, "__path__"):  # a folder, such as export/
        module = importlib.import_module(f"conan_engine.{name}.__main__")
    run(module.main)


def answered(about: str, *more: str) -> bool:
    """Whether this process was asked for --help or --version alone. If so, rank 0 prints it: about, or the version."""
    asked = {"--help", "-h", "--version"} & set(sys.argv[1:])
    if asked and os.environ.get("RANK", "0") == "0":
        print(f"conan-engine {__version__}" if "--version" in asked else "\n".join((about.rstrip(), *more)))
    return bool(asked)


def part(said: str) -> tuple[int, int]:
    """(I, K) of --part I/K. Raises UserError for anything else."""
    found = re.fullmatch(r"(\d+)/(\d+)", said)
    number, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= parts:
        raise UserError(f"--part: got {said!r}; expected I/K with I from 1 to K, such as 3/8")
    return number, parts


class Parser(argparse.ArgumentParser):
    """The arguments of `python -m conan_engine.NAME`, or conan-NAME. `about`, its module's docstring, is what --help
    begins with.
    """

    def __init__(self, name: str, about: str | None) -> None:
        called = Path(sys.argv[0]).name
        prog = called if called.startswith("conan-") else f"python -m conan_engine.{name}"
        super().__init__(prog=prog, description=about, formatter_class=_Help)
        self.add_argument("--version", action="version", version=f"conan-engine {__version__}")


class _Help(argparse.RawDescriptionHelpFormatter):
    """At most 80 columns; the default of each option behind its meaning."""

    def __init__(self, prog):
        super().__init__(prog, width=80, max_help_position=22)

    def _get_help_string(self, action):
        shown = action.option_strings and action.default not in (None, "", False, argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if shown else action.help


def _reader_is_gone() -> bool:
    """Whether nobody reads stdout any more, as after `| head`."""
    stdout = select.poll()
    stdout.register(1, 0)
    return any(event & select.POLLERR for _, event in stdout.poll(0))
