"""Every setting with its default, its range and the comment beside it in config.py."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

from conan_engine.config import Config


def settings_with_comments(node: Any = None, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Of every setting: (dotted key, default as one types it, its range and the comment beside or above it)."""
    node = node or Config()
    # a base class first: the last word counts
    lines = "".join(inspect.getsource(kind) for kind in type(node).__mro__[-2::-1])
    comments = {
        key: " ".join(re.findall(r"# (.*)", above + beside))
        for above, key, beside in re.findall(r"((?:^    # .*\n)*)^    (\w+): .*?(  # .*)?$", lines, re.MULTILINE)
        if above or beside
    }
    for key, value in vars(node).items():
        if dataclasses.is_dataclass(value):
            yield from settings_with_comments(value, f"{prefix}{key}.")
        else:
            said = "; ".join(filter(None, (range_of(type(node), key), comments.get(key))))
            yield f"{prefix}{key}", str(value).lower() if isinstance(value, bool) else value, said


def range_of(kind: type, key: str) -> str | None:
    """The interval of a number of one of these classes, where it was first declared; None of another setting."""
    declared = (
        base.__dict__["__dataclass_fields__"].get(key)
        for base in kind.__mro__
        if "__dataclass_fields__" in base.__dict__
    )
    return next((of.metadata["range"] for of in declared if of and "range" in of.metadata), None)


def ranges(node: Any, prefix: str = "") -> Iterator[tuple[str, float, str]]:
    """(dotted key, value, interval) of each number that has one."""
    for key, value in vars(node).items():
        if dataclasses.is_dataclass(value):
            yield from ranges(value, f"{prefix}{key}.")
        elif interval := range_of(type(node), key):
            yield f"{prefix}{key}", value, interval


def as_help() -> Iterator[str]:
    """A line for each setting, as --help shows it."""
    return (
        f"  --{key}={default}" + (f"  # {comment}" if comment else "")
        for key, default, comment in settings_with_comments()
    )
