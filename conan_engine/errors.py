"""How a command ends when it does not end well, said in one line: the exceptions, and the wrapper every command uses."""

import os
import re
import sys

from conan_engine.parallel import watch


class UserError(Exception):
    """Bad input: the message names the file, the line or key, what was found, and what to do. It is empty where another rank says it."""


class Stopped(BaseException):
    """Told to end by a signal, and nothing is lost; the message says where it stands. Not an Exception: nothing that mends
    errors on the way may take it for one."""


def another_ended(error):
    """Whether this is what a rank meets whose peer has ended, for a reason that the peer has said."""
    return isinstance(error, RuntimeError) and re.search(r"Connection (closed|reset) by peer", str(error)) is not None


def run(main):
    """Call `main()`; a UserError becomes one line on stderr and exit code 2.

    Stopped exits with 143, Ctrl-C with 130. os._exit, because a rank that ends must not wait in a destructor for peers that
    are blocked in a collective: the launcher then ends those.
    """
    try:
        main()
    except UserError as error:
        code, line = 2, str(error) and f"error: {error}"
    except Stopped as stopped:
        code, line = 143, str(stopped)
    except KeyboardInterrupt:
        code, line = 130, "interrupted"
    except RuntimeError as error:
        if another_ended(error):
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
