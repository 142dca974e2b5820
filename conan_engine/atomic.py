"""Files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from conan_engine.errors import UserError


def write(path: str | Path, save: Callable[[IO[bytes]], Any]) -> None:
    """save(file), by way of a file beside it that is then renamed. Raises UserError where `path` cannot be written."""
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as file:
            save(file)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write it ({error.strerror}); name a folder that exists and has room") from None
