"""Lines of bytes to rows: (place, dict), or (place, Bad) where a line cannot be read."""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from conan_engine.data.sources.bad import Bad
from conan_engine.errors import UserError

DECODER = json.JSONDecoder()


def decoded(file: Iterable[bytes], mine: Callable[[int], bool] = lambda number: True) -> Iterator[Any]:
    """(place, text) of each line, or Bad where it is not UTF-8; without a byte-order mark. mine(number): which ones."""
    for number, line in enumerate(file, 1):
        if not mine(number - 1):
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield f"line {number}", line.decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"not UTF-8 (byte {line[error.start]:#04x} at column {error.start + 1}); save the file as UTF-8"
            yield f"line {number}", Bad("not UTF-8", found)


def text(lines: Iterable[Any]) -> Iterator[Any]:
    """Each line is a text."""
    return ((place, line if isinstance(line, Bad) else {"text": line.rstrip("\r\n")}) for place, line in lines)


def json_lines(lines: Iterable[Any]) -> Iterator[Any]:
    """JSON Lines; empty lines are left out."""
    for place, line in lines:
        if isinstance(line, Bad):
            yield place, line
        elif line.strip():
            try:
                row = _parsed(line)
            except RecursionError:
                row = Bad("broken JSON", "broken JSON (nested too deeply); write one object a line")
            except ValueError as error:
                if "digits" in str(error):  # Python reads integers of up to 4,300 digits
                    row = Bad(
                        "not a finite number", "holds an integer of more than 4,300 digits; expected a finite number"
                    )
                else:
                    row = Bad("broken JSON", f"broken JSON ({error}); write one object a line")
            if not isinstance(row, dict | Bad):
                row = Bad("broken JSON", f"found a {type(row).__name__}; expected one JSON object a line")
            yield place, row


def _parsed(line):
    try:  # skips what json.loads looks for around the value, which is nearly never there
        row, end = DECODER.raw_decode(line)
        if line[end:] in ("\n", "\r\n", ""):
            return row
    except ValueError:
        pass
    return json.loads(line)


def table(path: Path, numbered: Iterable[Any], delimiter: str) -> Iterator[Any]:
    """CSV with a header, in the form of RFC 4180 and of spreadsheets; an empty cell is an absent key.

    Quoted cells may hold delimiters, doubled quotes and line breaks.
    """
    last, broken = ["line 1"], []

    def lines():
        for place, line in numbered:
            last[0] = place
            if isinstance(line, Bad):
                broken.append(line)
                line = "\n"
            yield line

    csv.field_size_limit(sys.maxsize)  # the default is 128 KiB, which a text can exceed
    rows = csv.reader(lines(), delimiter=delimiter, strict=True)
    header = None
    while True:
        try:
            cells = next(rows, None)
        except csv.Error as error:
            yield last[0], Bad("broken CSV", f"broken CSV ({error}); quote cells that hold quotes, and double those")
            continue
        if cells is None:
            return
        if broken:
            yield last[0], broken.pop()
        elif header is None:
            header = cells
            if len(set(header)) < len(header):
                raise UserError(
                    f"{path}: line 1: the header names a column twice: {header}; a table needs a header of "
                    "different names"
                )
        elif cells and len(cells) != len(header):
            yield (
                last[0],
                Bad(
                    "broken CSV",
                    f"{len(cells)} cells where the header has {len(header)}; quote cells that hold the delimiter",
                ),
            )
        elif cells:
            yield last[0], {key: cell for key, cell in zip(header, cells) if cell}
