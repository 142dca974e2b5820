"""What a person did wrong, said in one line: the exception, and the wrapper every command uses to print it."""

import os
import sys


class UserError(Exception):
    """Bad input: the message names the file, the line or key, what was found, and what to do."""


def run(main):
    """Call `main()`; a UserError becomes one line on stderr and exit code 2.

    Ctrl-C exits with 130. os._exit, because a rank that fails must not wait in a destructor for peers that are blocked
    in a collective: the launcher then ends those.
    """
    try:
        main()
    except UserError as error:
        code = 2
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
        print("interrupted", file=sys.stderr)
    else:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
