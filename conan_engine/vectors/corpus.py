"""A corpus: the documents of a source, in units of work that any number of processes share out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from conan_engine.data.encoding import join
from conan_engine.data.sources import paths
from conan_engine.data.sources.files import Reader
from conan_engine.errors import UserError

if TYPE_CHECKING:
    from conan_engine.data.sources.paths import Piece


KEPT = ("_id", "title", "url")  # of a record, if it has them
UNIT = 2**20  # bytes of files in a unit, at least: less than training's, since the work on a byte is more


class Document(NamedTuple):
    """id, title, url: the record's "_id", "title" and "url", or None. text: what is embedded of it, which begins with
    the title.
    """

    id: str | None
    text: str
    title: str | None = None
    url: str | None = None


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

    def unchanged(self, files: list[list]) -> bool:
        """Whether the files are those of `files`, as the method of this name gives them."""
        try:
            return self.files() == files
        except (UserError, OSError):  # they are gone
            return False

    def documents(self, pieces: Iterable[Piece]) -> Iterator[Document]:
        """The documents of some Pieces. Raises UserError for a bad record, naming file and line."""
        return map(self.document, self.reader(pieces))

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

    def reader(self, pieces: Iterable[Piece]) -> Reader:
        """The records of some Pieces, with their places."""
        return Reader(pieces, keep=KEPT)

    def document(self, found: tuple[str, dict[str, Any]]) -> Document:
        """The Document of a record that `reader` gave."""
        kind, record = found
        for key in ("text", "query", "input"):
            if key in record:
                break
        else:
            raise UserError(
                f'{self.name}: holds {kind} records; a corpus has {{"text"}}, {{"query"}} or {{"instruction"}} records'
            )
        text, name, title, url = record[key], *(record.get(key) for key in KEPT)
        title = title.strip() if kind == "text" and isinstance(title, str) else ""  # of BEIR's documents
        return Document(
            str(name) if isinstance(name, str | int) else None,
            join(record.get("instruction") or self.instruction, join(title, text)),
            title or None,
            url if isinstance(url, str) else None,
        )
