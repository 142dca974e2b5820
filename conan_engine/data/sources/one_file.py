"""The rows of a file, or of a part of one, by its ending."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from conan_engine.data.sources import columnar, parsing, paths
from conan_engine.data.sources.bad import Bad
from conan_engine.data.sources.compressed import opened
from conan_engine.errors import UserError

if TYPE_CHECKING:
    from conan_engine.data.sources.paths import Piece

MAKE_LINES = "python -c 'import json,sys; [print(json.dumps(r)) for r in json.load(sys.stdin)]'"


class File:
    """The rows of a piece of a file.

    A file of plain lines is cut at bytes, and a line belongs to the part in which it begins. Of any other file, the
    parts take turns at groups of lines, rows or row groups; in order, each has some neighbouring row groups.
    """

    STRIPE = 1024  # lines or rows at a turn

    def __init__(self, piece: Piece, ending: str = "") -> None:
        """ending: read it as a file with this ending, rather than by its own."""
        self.path, self.part, self.parts, self.in_order = piece.path, piece.part, piece.parts, piece.in_order
        self.ending = ending or paths.unpacked(piece.path)
        self.ranged = self.parts > 1 and self.path.suffix.lower() in paths.RANGED
        self._raw: Any = None
        self._begin = 0

    def rows(self) -> Iterator[Any]:
        """(place, dict or Bad) for each row."""
        if self.path.suffix.lower() in paths.TABLES:
            return columnar.rows(self.path, self.ending, self.part, self.parts, self.in_order)
        if self.ending in ("csv", "tsv"):
            cells = parsing.table(self.path, self.lines(), "\t" if self.ending == "tsv" else ",")
            return (row for number, row in enumerate(cells) if self._mine(number))
        if self.ending == "txt":
            return parsing.text(self.lines(self._mine))
        if self.ending in ("jsonl", "ndjson") or (self.ending == "json" and _holds_lines(self.path)):
            return parsing.json_lines(self.lines(self._mine))
        raise UserError(f"{self.path}: {_what(self.path)}")

    def lines(self, mine: Callable[[int], bool] = lambda number: True) -> Iterator[Any]:
        """(place, text or Bad) for each line, decoded, without a byte-order mark.

        Within a range of bytes, a place counts from the range's beginning; `located` converts it. mine(number): which
        lines to yield, where the piece is no range.
        """
        try:
            with open(self.path, "rb") as self._raw:
                if self.ranged:
                    yield from parsing.decoded(self._range(self._raw))
                else:
                    yield from parsing.decoded(opened(self.path, self._raw), mine)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{self.path}: damaged or cut-off gzip file ({error}); compress it again") from None
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be read ({error.strerror}); check its permissions and its disk"
            ) from None
        finally:
            self._raw = None

    def located(self, place: str) -> str:
        """A row's place in the whole file."""
        if not self.ranged:
            return place
        with open(self.path, "rb") as file:
            at, _ = self._bounds(file)
            file.seek(0)
            before = sum(file.read(min(1 << 20, at - start)).count(b"\n") for start in range(0, at, 1 << 20))
        return f"line {before + int(place.split()[1])}"

    def behind(self) -> int:
        """About how many bytes of the piece have been read."""
        if self._raw is None:
            return 0
        return self._raw.tell() - self._begin if self.ranged else self._raw.tell() // self.parts

    def _mine(self, number):
        return self.parts == 1 or self.ranged or number // self.STRIPE % self.parts == self.part

    def _bounds(self, file):
        """The byte at which the range's first line begins, and the byte before which its last line begins."""
        size = os.fstat(file.fileno()).st_size
        begin, end = (size * part // self.parts for part in (self.part, self.part + 1))
        if begin:
            file.seek(begin - 1)
            begin += len(file.readline()) - 1
        return begin, end

    def _range(self, file):
        at, end = self._bounds(file)
        self._begin = at
        file.seek(at)
        while at < end and (line := file.readline()):
            at += len(line)
            yield line


def _holds_lines(path):
    """Whether a .json file holds JSON Lines."""
    line = next((line for _, line in File(paths.Piece(path)).lines() if isinstance(line, Bad) or line.strip()), "")
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, TypeError, RecursionError):
        return False


def _what(path):
    """What a file is that cannot be read, and what to do."""
    _, first = next(File(paths.Piece(path)).lines(), ("", ""))
    head = "" if isinstance(first, Bad) else first.lstrip()
    if head.startswith("["):
        return (
            f"one JSON array, which cannot be streamed; turn it into JSON Lines: "
            f"{MAKE_LINES} < {path} > {path.stem}.jsonl"
        )
    if head.startswith("{"):
        try:
            json.loads(head)
        except ValueError:
            return (
                f"JSON of one object over several lines; turn its list of records into JSON Lines, "
                f"one object a line, and name the file {path.stem}.jsonl"
            )
        return f"JSON Lines by its first line; rename it to {path.stem}.jsonl"
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions and its disk") from None
    name = {
        b"PAR1": "a Parquet file; rename it to end in .parquet",
        b"ARRO": "an Arrow file; rename it to end in .arrow",
        b"PK\x03\x04": "a zip archive or a spreadsheet; save it as .csv",
        b"\x28\xb5\x2f\xfd": "compressed by zstd; rename it to end in .jsonl.zst",
    }
    known = name.get(
        magic,
        "compressed by gzip; rename it to end in .jsonl.gz"
        if magic[:2] == b"\x1f\x8b"
        else 'of an unknown kind; turn it into JSON Lines, one object such as {"text": "..."} a line',
    )
    return f"{known}. Read are {paths.ENDINGS}"
