"""A person's own text: JSON Lines, plain or .gz, and Parquet where pyarrow is installed. One kind of record a file."""

import gzip
import json
import zlib
from pathlib import Path

from conan_engine.errors import UserError

# kind -> key -> the types its value may have. A key that is optional has None among them.
KINDS = {
    "instruction": {"instruction": (str,), "input": (str, None), "output": (str,)},
    "pairs": {"query": (str,), "pos": (list, str), "neg": (list, str, None), "score": (float, int, None)},
    "sts": {"sentence1": (str,), "sentence2": (str,), "score": (float, int)},
    "label": {"text": (str,), "label": (str,)},
    "text": {"text": (str,)},
}


def kind(record):
    """Which of KINDS a record's keys make it, or None. {"text", "label"} is a label record."""
    for name, keys in KINDS.items():
        if all(key in record for key, types in keys.items() if None not in types):
            return name


def read(path):
    """Yield the records of a file as dicts, streaming: only the keys of its kind, "pos" and "neg" always lists.

    Raises UserError naming the file and the 1-based line (or row) for: a missing file, text that is not UTF-8, broken
    JSON, a missing key, a value of the wrong type, records of two kinds, a cut-off .gz, a file with no record.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file, nor the name of a built-in source; check the path")
    rows = _parquet(path) if path.suffix == ".parquet" else _json_lines(path)
    expected = None
    for place, row in rows:
        found = kind(row)
        if found is None:
            raise UserError(f"{path}: {place}: {_missing(row)}")
        expected = expected or found
        if found != expected:
            raise UserError(f"{path}: {place}: a {found} record in a file of {expected} records; put each kind in its own file")
        yield _checked(row, found, f"{path}: {place}")
    if expected is None:
        raise UserError(f"{path}: holds no records; give at least one line such as {{\"text\": \"...\"}}")


def _json_lines(path):
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                place = f"line {number}"
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}: {place}: not UTF-8 (byte {line[error.start]:#04x} at column {error.start + 1}); save the file as UTF-8") from None
                if not text.strip():
                    continue
                try:
                    row = json.loads(text)
                except ValueError as error:
                    raise UserError(f"{path}: {place}: broken JSON ({error}); write one object a line") from None
                if not isinstance(row, dict):
                    raise UserError(f"{path}: {place}: found a {type(row).__name__}; expected one JSON object a line")
                yield place, row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged or cut-off gzip file ({error}); compress it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions and its disk") from None


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
                yield f"row {number}", {key: value for key, value in row.items() if value is not None}
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file that pyarrow can read ({' '.join(str(error).split())}); write it again") from None


def _missing(row):
    """What the record most likely lacks: the kind that shares most keys with it says."""
    likeness = {name: len(keys.keys() & row.keys()) for name, keys in KINDS.items()}
    nearest = max(likeness, key=likeness.get)
    if likeness[nearest] == 0:
        return f"found keys {sorted(row)}; expected one of " + ", ".join(str(sorted(k)) for k in KINDS.values())
    lacking = [key for key, types in KINDS[nearest].items() if key not in row and None not in types]
    return f"key {lacking[0]!r} is missing from a {nearest} record with keys {sorted(row)}; add it"


def _checked(row, name, place):
    record = {}
    for key, types in KINDS[name].items():
        if key not in row:
            continue
        value = row[key]
        texts = value if isinstance(value, list) else []
        if isinstance(value, bool) or not isinstance(value, tuple(t for t in types if t)) or not all(isinstance(t, str) for t in texts):
            wanted = " or ".join("list of texts" if t is list else {str: "text", float: "number"}[t] for t in types if t not in (None, int))
            raise UserError(f"{place}: {key!r} is {json.dumps(value)[:60]}; expected {wanted}")
        record[key] = [value] if key in ("pos", "neg") and isinstance(value, str) else value
        if name not in ("text", "instruction") and "" in (texts or [value]):  # they may be empty there, a text to embed may not
            raise UserError(f"{place}: {key!r} holds an empty text; there is nothing to embed in it: fill it or leave the record out")
    if name == "pairs" and not record["pos"]:
        raise UserError(f"{place}: 'pos' is empty; a query needs at least one positive")
    if name == "instruction":
        record.setdefault("input", "")
    return record
