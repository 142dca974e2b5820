"""One process per run folder: a lock that ends with its process."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from conan_engine.errors import UserError


def hold(run: str | Path) -> IO[str] | None:
    """Lock a run's folder, which is created if it is missing, until the returned file is closed or this process
    ends.

    Raises UserError if another process holds the lock, naming it, and if the folder cannot be written.
    """
    path = Path(run, ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
    except OSError as error:
        raise UserError(f"{run}: cannot write here ({error.strerror}); choose another out_dir") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        who = file.read().strip() or "another process"
        raise UserError(
            f"{run}: {who} is training in this folder; wait until it ends, stop it, or choose another out_dir"
        ) from None
    except OSError as error:  # the file system has no locks
        print(f"{run}: cannot be locked ({error.strerror}); see to it that nothing else trains in it", flush=True)
    file.truncate(0)
    print(f"process {os.getpid()} on host {socket.gethostname()}", file=file, flush=True)
    return file
