"""Write a file so that it is complete, or not there at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from conan_engine.errors import UserError


def write(path: str | Path, save: Callable[[IO[bytes]], Any]) -> None:
    """Call save(file) on a file beside `path`, then rename it to `path`. Raises UserError if it cannot be written."""
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as file:
            save(file)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write it ({error.strerror}); use a folder that exists and has room") from None


def write_json(path: Path, content: Any) -> None:
    """The same for JSON, and for a crash of the machine: the folder's other files are on the disk before this one is.

    Raises UserError if it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(path.parent)
        partial.rename(path)
        _sync(path.parent)
    except OSError as error:
        raise UserError(
            f"{partial}: cannot write it: {error.strerror}; make room or choose another folder, then run again"
        ) from None


def _sync(directory):
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
