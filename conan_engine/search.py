"""Search a corpus of any size, or the documentation that is installed here.

The vectors of CORPUS are made once and kept in RUN, in float16; --vectors takes
those that encode wrote. The search is exact, unless --index names an index of
faiss, which is made once and kept beside the vectors. Under torchrun, ranks
make both together.

Examples:
    python -m conan_engine.search runs/demo "roots of a polynomial" --count 5
    python -m conan_engine.search runs/demo "a red bicycle" --corpus docs.jsonl
    python -m conan_engine.search runs/demo --queries queries.jsonl --json \\
        --vectors vectors --index IVF4096,SQ8 --search nprobe=32
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from conan_engine import atomic, command
from conan_engine.data.encoding import join
from conan_engine.data.sources import docstrings, files, paths, places
from conan_engine.data.sources.installed import HELD_OUT_PACKAGES, TRAINING_PACKAGES
from conan_engine.errors import UserError
from conan_engine.evaluation.bm25 import words
from conan_engine.evaluation.encoder import Encoder
from conan_engine.evaluation.searching import home, index_of, vectors_of
from conan_engine.vectors.blocks import until
from conan_engine.vectors.corpus import Corpus, Document
from conan_engine.vectors.making import Share
from conan_engine.vectors.nearest import Rule
from conan_engine.vectors.records import Records
from conan_engine.vectors.snippet import snippet
from conan_engine.vectors.stored import Stored

QUERIES = 4096  # that are searched at a time
NPROBE = 32  # lists of an inverted file that a query looks into
LINES, COLUMNS, INDENT = 2, 120, " " * 7  # of a result's text in the terminal


def main() -> None:
    arguments = parsed()
    sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal can show all characters of a text
    encoder = Encoder.load(arguments.run)
    share = Share.here(encoder.device, arguments.workers)
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        queries = asked(arguments, temporary) if share.rank == 0 else []
        with contextlib.redirect_stdout(sys.stderr):  # stdout has the results alone
            stored, records = opened(arguments, encoder, share, temporary)
            rule = Rule(arguments.index, arguments.search or f"nprobe={NPROBE}" * ("IVF" in arguments.index))
            search = index_of(stored, rule, encoder.device, share, temporary)
        for start in range(0, len(queries), QUERIES):
            batch = queries[start : start + QUERIES]
            vectors = encoder.encode([query.text for query in batch], stored.shape[1])
            found = [
                [(score, row) for score, row in zip(*one) if row >= 0]
                for one in zip(*(array.tolist() for array in search(vectors, arguments.count)))
            ]
            documents = records.of(row for one in found for _, row in one)
            for query, one in zip(batch, found):
                show(query, [(score, row, documents[row]) for score, row in one], arguments)


def parsed() -> argparse.Namespace:
    parser = command.Parser("search", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, such as runs/demo, or a checkpoint's")
    parser.add_argument("text", metavar="TEXT", nargs="?", help="the query")
    parser.add_argument(
        "--queries", metavar="FILE", help="in place of TEXT: a file of queries, or - for standard input"
    )
    of = parser.add_mutually_exclusive_group()
    of.add_argument(
        "--corpus",
        metavar="CORPUS",
        help=f"{paths.ENDINGS}; or a folder or pattern of these (default: the documentation that is installed here)",
    )
    of.add_argument("--vectors", metavar="PATH", help="the OUT of encode, in place of CORPUS")
    parser.add_argument(
        "--index",
        default="Flat",
        metavar="NAME",
        help="Flat, which is exact; or a string of faiss' index factory, such as IVF4096,SQ8 for a million texts",
    )
    parser.add_argument(
        "--search",
        default="",
        metavar="SETTINGS",
        help=f"of the index, as faiss writes them (default: nprobe={NPROBE} for an IVF)",
    )
    parser.add_argument("--dim", type=int, metavar="N", help="keep the first N numbers of each vector (default: all)")
    parser.add_argument("--instruction", default="", metavar="TEXT", help="put TEXT and a new line before each query")
    parser.add_argument("--count", type=int, default=10, metavar="N", help="how many results of a query to print")
    parser.add_argument("--json", action="store_true", help="print one JSON object a query, with the whole texts")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes of each rank that read and tokenise (default: its cores)"
    )
    arguments = parser.parse_args()
    if (arguments.text is None) == (arguments.queries is None):
        raise UserError("expected either TEXT or --queries; give one of them")
    if arguments.text is not None and not arguments.text.strip():
        raise UserError("TEXT is empty; say in a few words what you look for")
    if arguments.count < 1:
        raise UserError(f"--count is {arguments.count}; expected at least 1")
    if arguments.vectors and arguments.dim:
        raise UserError("--dim is for texts that search itself turns into vectors; leave it out with --vectors")
    return arguments


def asked(arguments: argparse.Namespace, folder: Path) -> list[Document]:
    """The queries, each with its instruction."""
    if arguments.queries is None:
        return [Document(None, join(arguments.instruction, arguments.text))]
    given = arguments.queries == "-"
    source = str(files.keep_standard_input(folder / "queries")) if given else arguments.queries
    corpus = Corpus(source, "standard input" if given else source, arguments.instruction)
    found = list(corpus.documents(itertools.chain.from_iterable(corpus.units())))
    if not found:
        raise files.nothing_in(corpus.name)
    return found


def opened(arguments: argparse.Namespace, encoder: Encoder, share: Share, temporary: Path) -> tuple[Stored, Records]:
    """The vectors to search, which are made if need be, and what stands in their rows."""
    if arguments.vectors:
        stored = Stored(arguments.vectors, encoder.model.config.width)
        if stored.about and stored.about["weights"] != encoder.weights:
            raise UserError(
                f"{arguments.vectors}: made with other weights than those of {arguments.run}; encode the corpus again, "
                "or name the run that made them"
            )
        records = Records(stored)
        if stored.about and records.corpus is None:
            print(f"{stored.about['source']}: not here, or it has changed since it was encoded; ids alone are shown")
        return stored, records
    place = home(Path(arguments.run), share, temporary)
    dim = encoder.checked(arguments.dim)
    if arguments.corpus:
        corpus = Corpus(arguments.corpus, arguments.corpus)
        source = Path(arguments.corpus)
        whole = source.resolve() if source.exists() else source  # a pattern, or a name on the Hub
        folder = place / f"search-{source.name.partition('.')[0]}-{_digest([str(whole), dim])}"
    else:
        documents = documentation(place, share.rank == 0)
        corpus = Corpus(str(documents), str(documents))
        folder = place / f"search-documentation-{dim}"
    stored = vectors_of(encoder, corpus, folder, dim, share)
    return stored, Records(stored)


def documentation(folder: Path, make: bool) -> Path:
    """A file of the documentation of all packages that the demo reads, as a corpus. It is kept until one of their files
    changes.

    make: this process writes it, and others wait for it.
    """
    every = TRAINING_PACKAGES + HELD_OUT_PACKAGES
    packages = [package for package in every if package == "stdlib" or places.installed(package)]
    modules = [path for package in packages for path, _ in docstrings.modules(package)]
    of = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in modules]
    path = folder / f"search-documentation-{_digest(of)}.jsonl"
    if make and not path.exists():
        print(f"reading {len(modules):,} files of documentation, once ...", flush=True)
        docs = (
            {"_id": doc.name, "url": f"{doc.path}:{doc.line}", "text": f"{doc.summary}\n{doc.rest}"}
            for doc in docstrings.read(packages)
            if doc.rest
        )
        atomic.write(path, lambda file: file.writelines(json.dumps(doc).encode() + b"\n" for doc in docs))
        for old in set(folder.glob("search-documentation-*.jsonl")) - {path}:
            old.unlink()
    until(path.exists)
    return path


def show(query: Document, found: list[tuple[float, int, Document]], arguments: argparse.Namespace) -> None:
    """Print the results of a query: (score, row, Document) each, the best first."""
    if arguments.json:
        results = [
            {"score": round(score, 6), "row": row} | {key: value for key, value in of._asdict().items() if value}
            for score, row, of in found
        ]
        return print(json.dumps({"id": query.id, "query": query.text, "results": results}, ensure_ascii=False))
    if arguments.queries:
        print(f"\n{query.id or ''}  {' '.join(query.text.split())}".rstrip())
    width = min(COLUMNS, shutil.get_terminal_size((COLUMNS, 0)).columns) - len(INDENT)
    for score, row, document in found:
        place = (document.url or "").removeprefix(f"{Path.cwd()}/")
        about = [part for part in (document.id, document.title, place) if part]
        print("  ".join((f"{score:.3f}", *(about or [f"row {row:,}"]))))
        text = document.text.removeprefix(document.title or "")
        for line in textwrap.wrap(snippet(text, words(query.text), LINES * width - 8), width)[:LINES]:
            print(INDENT + line)


def _digest(of: Any) -> str:
    return hashlib.blake2b(repr(of).encode(), digest_size=4).hexdigest()


if __name__ == "__main__":
    command.run(main)
