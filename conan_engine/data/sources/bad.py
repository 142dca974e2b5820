"""What is wrong with one record."""

from __future__ import annotations

import json
from typing import Any


class Bad(Exception):
    """A record that cannot be used. `reason`: a few words to count by; the message is for a person."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def wrong(value: Any, place: str, wanted: str) -> Bad:
    """The Bad of a value that has another type than `wanted`."""
    return Bad("wrong type", f"{place} is {short(value)}; expected {wanted}")


def short(value: Any) -> str:
    """A value as an error line shows it."""
    try:
        shown = json.dumps(value, default=repr)
    except ValueError:  # an integer with more digits than Python prints
        shown = "a number of more than 4,000 digits"
    return shown if len(shown) <= 60 else shown[:57] + "..."
