"""Write a file so that it is complete, or not there at all."""

from __future__ import annotations

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
