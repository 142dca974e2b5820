"""The source code of installed packages, whole files, as text for language modelling."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from conan_engine.data.sources import docstrings

SHORTEST, LONGEST = 400, 200_000  # shortest and longest file in characters: less says little, more is mostly data
WIDEST = 200  # widest average line in characters: beyond it, a program wrote the file


class CodeFile(NamedTuple):
    module: str  # numpy.linalg
    text: str


def read(packages: Iterable[str], without: Iterable[str] = ()) -> Iterator[CodeFile]:
    """Yield the CodeFiles of packages, each text once. Raises UserError for a package that is not installed.

    without: modules whose name has one of these parts are left out, since other packages carry copies of them.
    """
    seen = set()
    for package in packages:
        for path, module in docstrings.modules(package):
            if set(module.split(".")) & set(without):
                continue
            try:
                text = path.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError):
                continue
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            if SHORTEST <= len(text) <= LONGEST and len(text) <= WIDEST * (text.count("\n") + 1) and digest not in seen:
                seen.add(digest)
                yield CodeFile(module, text)
