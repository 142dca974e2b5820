"""Datasets of the Hugging Face Hub, "hf:OWNER/NAME:CONFIG:SPLIT@REVISION", by the `datasets` package and its cache."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from conan_engine.errors import UserError

PREFIX = "hf:"
FORM = re.compile(r"hf:([^:@]+)(?::([^:@]*))?(?::(\w+))?(?:@([^:@]+))?")


@functools.cache  # each stage asks for it
def files(source: str) -> list[Path]:
    """The Arrow files in which `datasets` keeps a split ("train" by default), downloaded if they are not cached.

    Raises UserError if it cannot be loaded, and if `datasets` is not installed.
    """
    found = FORM.fullmatch(source)
    if not found:
        raise UserError(
            f"{source}: expected hf:OWNER/NAME, hf:OWNER/NAME:CONFIG or hf:OWNER/NAME:CONFIG:SPLIT, each also "
            "with @REVISION"
        )
    name, config, split, revision = found.groups()
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{source}: what the Hub has is loaded by datasets, which is not installed; pip install -e .[hub]"
        ) from None
    try:
        loaded = datasets.load_dataset(name, config or None, split=split or "train", revision=revision)
    except Exception as error:  # errors of the network, the Hub and the dataset's files share no class
        raise UserError(
            f"{source}: datasets cannot load it ({type(error).__name__}: {' '.join(str(error).split())[:300]}); "
            "check the name, its config and split, and the network"
        ) from None
    return [Path(file["filename"]) for file in loaded.cache_files]
