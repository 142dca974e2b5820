"""What is wrong with one record."""

from __future__ import annotations

import json
from typing import Any


class Bad(Exception):
    """`reason` in a few words, to count by; the message for a person."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def wrong(value: Any, place: str, wanted: str) -> Bad:
    """A Bad for a value of another type."""
    return Bad("wrong type", f"{place} is {short(value)}; expected {wanted}")


def short(value: Any) -> str:
    """A value as a line shows it."""
    try:
        shown = json.dumps(value, default=repr)
    except ValueError:  # an integer of more digits than Python prints
        shown = "a number of more than 4,000 digits"
    return shown if len(shown) <= 60 else shown[:57] + "..."
