"""Read a GGUF file (llama.cpp's format): its metadata and its tensors."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from conan_engine.errors import UserError

SUFFIX = ".gguf"


def is_gguf(path: str | Path) -> bool:
    """Whether `path` has the name of a GGUF file."""
    return Path(path).suffix == SUFFIX and Path(path).is_file()


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """({key: value}, {name: gguf.ReaderTensor}) of a file; tensors are mapped, not read.

    Raises UserError for a file that is no GGUF, is cut short, or is one of several parts.
    """
    return _read(str(path), Path(path).stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)  # the tokens take a second to read, and three callers need them
def _read(path, _):
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"{path}: reading it needs the package gguf ({error}); pip install gguf") from None
    try:
        reader = GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(
            f"{path}: cannot read it as a GGUF file ({' '.join(str(error).split())}); it may be cut short: "
            "fetch it again"
        ) from None
    if fields.get("split.count", 1) > 1:
        raise UserError(
            f"{path}: is one of {fields['split.count']} parts; join them with llama.cpp's `llama-gguf-split --merge`"
        )
    return fields, tensors
