"""A person's own text: JSON Lines, CSV, TSV and plain text, as they are or as .gz or .zst, and Parquet where pyarrow is installed. One
kind of record a source."""

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from pathlib import Path

from conan_engine.data.sources import paths
from conan_engine.data.sources.forms import Bad, record
from conan_engine.errors import UserError

MAKE_LINES = "python -c 'import json,sys; [print(json.dumps(r)) for r in json.load(sys.stdin)]'"


def read(source, columns=None, reject=None):
    """Yield (kind, record) for the records of the files of a source (paths.of), one after another, streaming: dicts of only the keys of their
    kind, as forms.record gives.

    columns: {the engine's key: the file's}, where the file's own names are none that forms.FORMS knows. reject: called with
    the place ("line 3", of several files "web/b.jsonl: line 3") and the Bad of each record that cannot be used, which is then left out; None: it
    raises UserError, naming file and line (or row). Raises UserError too for a missing file, one that is not what its ending says, files of
    different kinds, and a source without a record.
    """
    return _some(source, _of_files(paths.of(source), columns or {}, reject))


def _of_files(found, columns, reject):
    expected = None
    for path in found:
        ending = paths.unpacked(path)
        inside = None if reject is None else reject if len(found) == 1 else lambda place, bad, path=path: reject(f"{path}: {place}", bad)
        for kind, one in _records(path, _rows(path, ending), columns, ending not in ("csv", "tsv"), inside):
            expected = expected or (kind, path)
            if kind != expected[0]:
                raise UserError(f"{path}: holds {kind} records, and {expected[1]} {expected[0]} records; make each kind a source of its own")
            yield kind, one


def _some(name, records):
    """The same, of which there must be one."""
    none = True
    for one in records:
        none = False
        yield one
    if none:
        raise UserError(f"{name}: holds no records that can be used; give at least one line such as {{\"text\": \"...\"}}")


def rows(path, ending=""):
    """Yield (place, dict) for each row of a file, whatever its keys, or for each line of text of what has the ending ".txt", streaming.
    Raises UserError as `read` does."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    for place, row in _rows(path, ending.removeprefix(".") or paths.unpacked(path)):
        if isinstance(row, Bad):
            raise UserError(f"{path}: {place}: {row}")
        yield place, row


def read_standard_input():
    """As `read`, of standard input: JSON Lines if its first character is a brace, else a text a line."""
    stream, name = sys.stdin.buffer, "standard input"
    lines = _decoded(stream)
    rows = _json_lines(lines) if stream.peek(4).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{" else _text(lines)
    return _some(name, _records(name, rows, {}, True, None))


def _records(path, rows, columns, typed, reject):
    """(kind, record) of each row, of one kind."""
    expected = None
    for place, row in rows:
        try:
            if isinstance(row, Bad):
                raise row
            kind, found = record(row, columns, typed)
            if kind != (expected or kind):
                raise Bad("another kind", f"a {kind} record in a file of {expected} records; put each kind in its own file")
        except Bad as bad:
            if reject is None:
                raise UserError(f"{path}: {place}: {bad}") from None
            reject(place, bad)
            continue
        expected = kind
        yield kind, found


def _rows(path, ending):
    """(place, dict or Bad) for each row of a file."""
    if ending == "parquet" and path.suffix == ".parquet":
        return _parquet(path)
    if ending in ("csv", "tsv"):
        return _table(path, "\t" if ending == "tsv" else ",")
    if ending == "txt":
        return _text(_lines(path))
    if ending in ("jsonl", "ndjson") or (ending == "json" and _holds_lines(path)):
        return _json_lines(_lines(path))
    raise UserError(f"{path}: {_what(path)}")


def _lines(path):
    """(place, text or Bad) for each line, decoded; a byte-order mark is left out."""
    try:
        with _opened(path) as file:
            yield from _decoded(file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged or cut-off gzip file ({error}); compress it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions and its disk") from None


def _opened(path):
    """A file as bytes, unpacked."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    return io.BufferedReader(_Zstd(path), 1 << 20) if path.suffix == ".zst" else open(path, "rb")


class _Zstd(io.RawIOBase):
    """A .zst file of any number of frames, unpacked as it is read. Raises UserError where it is damaged or cut off, which zstandard's own reader
    does not see."""

    def __init__(self, path):
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{path}: reading .zst needs zstandard, which is not installed; pip install zstandard") from None
        self.path, self.file, self.error = path, open(path, "rb"), zstandard.ZstdError
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

    def close(self):
        if not self.closed:
            self.file.close()
        super().close()


def _decoded(file):
    for number, line in enumerate(file, 1):
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
                row = json.loads(line)
            except RecursionError:
                row = Bad("broken JSON", "broken JSON (nested too deeply); write one object a line")
            except ValueError as error:
                if "digits" in str(error):  # Python reads integers of up to 4,300
                    row = Bad("not a finite number", "holds an integer of more than 4,300 digits; expected a finite number")
                else:
                    row = Bad("broken JSON", f"broken JSON ({error}); write one object a line")
            if not isinstance(row, dict | Bad):
                row = Bad("broken JSON", f"found a {type(row).__name__}; expected one JSON object a line")
            yield place, row


def _table(path, delimiter):
    """CSV with a header, as RFC 4180 and spreadsheets have it: quoted cells may hold delimiters, doubled quotes and line breaks. An
    empty cell is an absent key."""
    last, broken = ["line 1"], []

    def lines():
        for place, line in _lines(path):
            last[0] = place
            if isinstance(line, Bad):
                broken.append(line)
                line = "\n"
            yield line

    csv.field_size_limit(sys.maxsize)  # 128 KiB otherwise, which a text may well be longer than
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
                raise UserError(f"{path}: line 1: the header names a column twice: {header}; a table needs a header of different names")
        elif cells and len(cells) != len(header):
            yield last[0], Bad("broken CSV", f"{len(cells)} cells where the header has {len(header)}; quote cells that hold the delimiter")
        elif cells:
            yield last[0], {key: cell for key, cell in zip(header, cells) if cell}


def _parquet(path):
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow, which is not installed; pip install pyarrow") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file that pyarrow can read ({' '.join(str(error).split())}); write it again") from None


def _holds_lines(path):
    """Whether a .json file is JSON Lines under another name."""
    line = next((line for _, line in _lines(path) if isinstance(line, Bad) or line.strip()), "")
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, TypeError, RecursionError):
        return False


def _what(path):
    """For a file that cannot be read: what it is, and what to do."""
    _, first = next(_lines(path), ("", ""))
    head = "" if isinstance(first, Bad) else first.lstrip()
    if head.startswith("["):
        return f"one JSON array, which cannot be streamed; turn it into JSON Lines: {MAKE_LINES} < {path} > {path.stem}.jsonl"
    if head.startswith("{"):
        try:
            json.loads(head)
        except ValueError:
            return f"JSON of one object over several lines; turn its list of records into JSON Lines, one object a line, and name the file {path.stem}.jsonl"
        return f"JSON Lines by its first line; rename it to {path.stem}.jsonl"
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions and its disk") from None
    name = {b"PAR1": "a Parquet file; rename it to end in .parquet", b"PK\x03\x04": "a zip archive or a spreadsheet; save it as .csv", b"\x28\xb5\x2f\xfd": "compressed by zstd; rename it to end in .jsonl.zst"}
    known = name.get(magic, "compressed by gzip; rename it to end in .jsonl.gz" if magic[:2] == b"\x1f\x8b" else "of an unknown kind; turn it into JSON Lines, one object such as {\"text\": \"...\"} a line")
    return f"{known}. Read are {paths.ENDINGS}"
