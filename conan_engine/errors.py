"""How bad input and a signal to end are told from other exceptions."""


class UserError(Exception):
    """Bad input: the message names the file, the line or key, what was found, and what to do. It is empty where another
    rank says it."""


class Stopped(BaseException):
    """Told to end by a signal, and nothing is lost; the message says where it stands. Not an Exception: nothing that
    mends errors on the way may take it for one."""
