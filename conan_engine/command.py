"""How every command ends: with one line and an exit code where something is wrong, without a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from conan_engine.errors import Stopped, UserError
from conan_engine.parallel import watch


def run(main: Callable[[], None]) -> None:
    """Call `main()`; a UserError becomes one line on stderr and exit code 2.

    Stopped exits with 143, Ctrl-C with 130. os._exit, because a rank that ends must not wait in a destructor for peers
    that are blocked in a collective: the launcher then ends those.
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


def _reader_is_gone() -> bool:
    """Whether nobody reads stdout any more, as behind `| head`."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False
