"""Read the user's own files: JSON Lines, CSV, TSV and plain text, also as .gz or .zst; Parquet and Arrow by pyarrow.

All records of a source are of one kind.
"""

from __future__ import annotations

import codecs
import csv
import functools
import gzip
import io
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conan_engine.data.sources import paths
from conan_engine.data.sources.bad import Bad
from conan_engine.data.sources.forms import record
from conan_engine.errors import UserError

if TYPE_CHECKING:
    from conan_engine.data.sources.paths import Piece


DECODER = json.JSONDecoder()
BATCH = 1024  # rows of a table that become Python objects at a time
MAKE_LINES = "python -c 'import json,sys; [print(json.dumps(r)) for r in json.load(sys.stdin)]'"


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
            self._file = _File(piece)
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
    for place, row in _File(paths.Piece(path), ending.removeprefix(".")).rows():
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


class _File:
    """The rows of a piece of a file.

    A file of plain lines is cut at bytes, and a line belongs to the part in which it begins. Of any other file, the
    parts take turns at groups of lines, rows or row groups; in order, each has some neighbouring row groups.
    """

    STRIPE = 1024  # lines or rows at a turn

    def __init__(self, piece, ending=""):
        self.path, self.part, self.parts, self.in_order = piece.path, piece.part, piece.parts, piece.in_order
        self.ending = ending or paths.unpacked(piece.path)
        self.ranged = self.parts > 1 and self.path.suffix.lower() in paths.RANGED
        self._raw, self._begin = None, 0

    def rows(self):
        """(place, dict or Bad) for each row."""
        if self.path.suffix.lower() in paths.TABLES:
            return self._of_batches(_of_parquet if self.ending == "parquet" else _of_arrow)
        if self.ending in ("csv", "tsv"):
            return (
                row
                for number, row in enumerate(_table(self.path, self.lines(), "\t" if self.ending == "tsv" else ","))
                if self._mine(number)
            )
        if self.ending == "txt":
            return _text(self.lines(self._mine))
        if self.ending in ("jsonl", "ndjson") or (self.ending == "json" and _holds_lines(self.path)):
            return _json_lines(self.lines(self._mine))
        raise UserError(f"{self.path}: {_what(self.path)}")

    def lines(self, mine=lambda number: True):
        """(place, text or Bad) for each line, decoded, without a byte-order mark.

        Within a range of bytes, a place counts from the range's beginning; `located` converts it. mine(number): which
        lines to yield, where the piece is no range.
        """
        try:
            with open(self.path, "rb") as self._raw:
                if self.ranged:
                    yield from _decoded(self._range(self._raw))
                else:
                    yield from _decoded(_opened(self.path, self._raw), mine)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{self.path}: damaged or cut-off gzip file ({error}); compress it again") from None
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be read ({error.strerror}); check its permissions and its disk"
            ) from None
        finally:
            self._raw = None

    def located(self, place):
        """A row's place in the whole file."""
        if not self.ranged:
            return place
        with open(self.path, "rb") as file:
            at, _ = self._bounds(file)
            file.seek(0)
            before = sum(file.read(min(1 << 20, at - start)).count(b"\n") for start in range(0, at, 1 << 20))
        return f"line {before + int(place.split()[1])}"

    def behind(self):
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

    def _of_batches(self, read):
        """read(path): the row groups of the file in turn, each as (number of rows, function that gives its record
        batches).
        """
        kind = {"parquet": "a Parquet", "arrow": "an Arrow"}[self.ending]
        try:
            import pyarrow
        except ImportError:
            raise UserError(
                f"{self.path}: reading {kind} file needs pyarrow, which is not installed; pip install pyarrow"
            ) from None
        number = 0
        try:
            groups = _row_groups(self.path) if self.in_order and self.parts > 1 else 0
            for group, (size, batches) in enumerate(read(self.path)):
                if (group * self.parts // groups if groups else group % self.parts) != self.part:
                    number += size
                    continue
                for batch in batches():
                    for row in batch.to_pylist():
                        number += 1
                        yield f"row {number}", row
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{self.path}: not {kind} file that pyarrow can read ({' '.join(str(error).split())}); write it again"
            ) from None


def _of_parquet(path):
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield (
                file.metadata.row_group(group).num_rows,
                functools.partial(file.iter_batches, BATCH, row_groups=[group]),
            )


def _row_groups(path):
    import pyarrow.parquet as parquet

    return parquet.read_metadata(path).num_row_groups


def _of_arrow(path):
    """The record batches of an Arrow file, in its stream form, which datasets writes, or its file form (Feather)."""
    import pyarrow
    from pyarrow import ipc

    with pyarrow.memory_map(str(path)) as mapped:
        if mapped.read(6) == b"ARROW1":
            file = ipc.open_file(mapped)
            batches = map(file.get_batch, range(file.num_record_batches))
        else:
            mapped.seek(0)
            batches = ipc.open_stream(mapped)
        for batch in batches:
            yield (
                batch.num_rows,
                lambda batch=batch: (batch.slice(start, BATCH) for start in range(0, batch.num_rows, BATCH)),
            )


def _opened(path, raw):
    """An open file, decompressed."""
    if path.suffix == ".gz":
        return gzip.open(raw, "rb")
    return io.BufferedReader(_Zstd(path, raw), 1 << 20) if path.suffix == ".zst" else raw


class _Zstd(io.RawIOBase):
    """A .zst file of any number of frames, decompressed while it is read.

    Raises UserError if it is damaged or cut off, which zstandard's own reader does not notice.
    """

    def __init__(self, path, file):
        try:
            import zstandard
        except ImportError:
            raise UserError(
                f"{path}: reading .zst needs zstandard, which is not installed; pip install zstandard"
            ) from None
        self.path, self.file, self.error = path, file, zstandard.ZstdError
        self.frame = lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
        self.unpacking, self.packed, self.ready = None, b"", b""

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.ready:
            self.packed = self.packed or self.file.read(1 << 16)
            if not self.packed:
                if self.unpacking:
                    self.damaged("the file ends within a frame")
                return 0
            self.unpacking = self.unpacking or self.frame()
            try:
                self.ready = memoryview(self.unpacking.decompress(self.packed))
            except self.error as error:
                self.damaged(error)
            self.packed = b""
            if self.unpacking.eof:
                self.packed, self.unpacking = self.unpacking.unused_data, None
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count

    def damaged(self, error):
        raise UserError(f"{self.path}: damaged or cut-off zstd file ({error}); compress it again")


def _decoded(file, mine=lambda number: True):
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


def _text(lines):
    return ((place, line if isinstance(line, Bad) else {"text": line.rstrip("\r\n")}) for place, line in lines)


def _json_lines(lines):
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


def _table(path, numbered, delimiter):
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


def _holds_lines(path):
    """Whether a .json file holds JSON Lines."""
    line = next((line for _, line in _File(paths.Piece(path)).lines() if isinstance(line, Bad) or line.strip()), "")
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, TypeError, RecursionError):
        return False


def _what(path):
    """What a file is that cannot be read, and what to do."""
    _, first = next(_File(paths.Piece(path)).lines(), ("", ""))
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
