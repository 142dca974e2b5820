"""Exceptions that end a command in one line: bad input, and a signal to stop."""


class UserError(Exception):
    """Bad input. The message names the file, the line or key, what was found, and what to do. It is empty where another
    rank reports it.
    """


class Stopped(BaseException):
    """A signal asked the process to end, and everything is saved; the message says where the run stands.

    It is a BaseException, so that no handler of errors takes it for one.
    """
