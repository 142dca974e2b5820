"""A corpus: the documents of a source, in units of work that any number of processes share out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from conan_engine.data.encoding import join
from conan_engine.data.sources import files, paths
from conan_engine.errors import UserError

if TYPE_CHECKING:
    from conan_engine.data.sources.paths import Piece


UNIT = 2**20  # bytes of files in a unit, at least: less than training's, since the work on a byte is more


class Document(NamedTuple):
    """id: the record's "_id", or None; text: what is embedded of it."""

    id: str | None
    text: str


class Corpus(NamedTuple):
    """source: any that data.sources.paths knows; name: how messages call it; instruction: put before each text that
    has none of its own.
    """

    source: str
    name: str
    instruction: str = ""

    def units(self) -> list[list[Piece]]:
        return paths.cut(self.source, UNIT, in_order=True)

    def files(self) -> list[list]:
        """[path, bytes, time of the last change in ns] of each file."""
        return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths.of(self.source)]

    def documents(self, pieces: list[Piece]) -> Iterator[Document]:
        """The documents of some Pieces. Raises UserError for a bad record, naming file and line."""
        return map(self._document, self._reader(pieces))

    def tally(self, pieces: list[Piece], ids: str | Path) -> tuple[int, int]:
        """(documents, how many of them have an id). The ids go to a file, one JSON text a line, if there are any."""
        count = named = 0
        with open(ids, "w", encoding="utf-8") as file:
            for document in self.documents(pieces):
                count += 1
                if document.id is not None:
                    named += 1
                    file.write(json.dumps(document.id, ensure_ascii=False) + "\n")
        if not named:
            Path(ids).unlink()
        return count, named

    def _reader(self, pieces):
        return files.Reader(pieces, keep=("_id", "title"))

    def _document(self, found: tuple[str, dict[str, Any]]) -> Document:
        kind, record = found
        for key in ("text", "query", "input"):
            if key in record:
                break
        else:
            raise UserError(
                f'{self.name}: holds {kind} records; encode takes {{"text"}}, {{"query"}} or {{"instruction"}} records'
            )
        text, title, name = record[key], record.get("title"), record.get("_id")
        if kind == "text" and isinstance(title, str):  # as evaluate reads BEIR's documents
            text = join(title.strip(), text)
        return Document(
            str(name) if isinstance(name, str | int) else None,
            join(record.get("instruction") or self.instruction, text),
        )
