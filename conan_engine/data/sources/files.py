"""Read the user's own files: JSON Lines, CSV, TSV and plain text, also as .gz or .zst; Parquet and Arrow by pyarrow.

All records of a source are of one kind.
"""

from __future__ import annotations

import codecs
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conan_engine.data.sources import paths
from conan_engine.data.sources.bad import Bad
from conan_engine.data.sources.forms import record
from conan_engine.data.sources.one_file import File
from conan_engine.errors import UserError

if TYPE_CHECKING:
    from conan_engine.data.sources.paths import Piece


def read(source: str | Path, columns: dict | None = None, reject: Callable | None = None) -> Iterator[tuple[str, dict]]:
    """Yield (kind, record) for the records of a source's files (paths.of), streaming; records as forms.record gives
    them.

    columns: {our key: the file's}, if the file's names are not in forms.FORMS. reject: called with the path, the place
    ("line 3") and the Bad of each bad record, which is then left out. Raises UserError for a missing file, one that is
    not what its ending says, files of different kinds, a source without records, and, without `reject`, for a bad
    record, naming file and line.
    """
    return _some(source, Reader([paths.Piece(path) for path in paths.of(source)], columns, reject))


class Reader:
    """The records of Pieces of files, as `read` gives them; there may be none.

    keep: further keys, whose values a record has too where its row has them. While it reads, `where` is the (path,
    place) of the last record, and `behind` about the number of bytes read.
    """

    def __init__(
        self,
        pieces: Iterable[Piece],
        columns: dict | None = None,
        reject: Callable | None = None,
        keep: tuple[str, ...] = (),
    ) -> None:
        self.pieces, self.columns, self.reject, self.keep = pieces, columns or {}, reject, keep
        self._file: Any = None
        self._place, self._before = "", 0

    def __iter__(self):
        first = None
        for piece in self.pieces:
            self._file = File(piece)
            rows = self._file.rows()
            for place, kind, found in _records(
                rows, self.columns, self._file.ending not in ("csv", "tsv"), self._left_out, self.keep
            ):
                self._place = place
                first = first or (kind, piece.path)
                if kind != first[0]:
                    raise UserError(
                        f"{piece.path}: holds {kind} records, and {first[1]} {first[0]} records; make each kind "
                        "a source of its own"
                    )
                yield kind, found
            self._file = None
            self._before += piece.bytes

    @property
    def where(self) -> tuple[Path, str]:
        """(path, place) of the last record."""
        return self._file.path, self._file.located(self._place)

    def leave_out(self, bad: Bad) -> None:
        """Treat the last record as a bad one. Raises UserError, naming file and place, if none is to be left out."""
        self._left_out(self._place, bad)

    @property
    def behind(self) -> int:
        """About how many bytes have been read."""
        return self._before + (self._file.behind() if self._file else 0)

    def _left_out(self, place, bad):
        place = self._file.located(place)
        if self.reject is None:
            raise UserError(f"{self._file.path}: {place}: {bad}") from None
        self.reject(self._file.path, place, bad)


def _some(name, records):
    """The same records, of which there must be one. Raises UserError."""
    none = True
    for one in records:
        none = False
        yield one
    if none:
        raise nothing_in(name)


def nothing_in(source: str | Path) -> UserError:
    """The error of a source without records."""
    return UserError(f'{source}: holds no records that can be used; give at least one line such as {{"text": "..."}}')


def rows(path: str | Path, ending: str = "") -> Iterator[Any]:
    """Yield (place, dict) for each row of a file, whatever its keys, streaming. Raises UserError as `read` does.

    ending: read the file as one with this ending; ".txt" gives each line of text.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    for place, row in File(paths.Piece(path), ending.removeprefix(".")).rows():
        if isinstance(row, Bad):
            raise UserError(f"{path}: {place}: {row}")
        yield place, row


def keep_standard_input(path: Path) -> Path:
    """Write standard input to `path`, with the ending that says what it is: JSON Lines if its first character is a
    brace, else one text a line. Returns the file's path.
    """
    stream = sys.stdin.buffer
    lines = stream.peek(4).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{"
    path = path.with_suffix(".jsonl" if lines else ".txt")
    with open(path, "wb") as file:
        shutil.copyfileobj(stream, file, 1 << 20)
    return path


def _records(rows, columns, typed, reject, keep):
    """(place, kind, record) of each row, all of one kind; reject(place, bad) is called for the others."""
    expected = None
    for place, row in rows:
        try:
            if isinstance(row, Bad):
                raise row
            kind, found = record(row, columns, typed)
            if kind != (expected or kind):
                raise Bad(
                    "another kind", f"a {kind} record in a file of {expected} records; put each kind in its own file"
                )
        except Bad as bad:
            reject(place, bad)
            continue
        expected = kind
        for key in keep:
            if key in row:
                found[key] = row[key]
        yield place, kind, found
