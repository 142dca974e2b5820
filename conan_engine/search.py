"""Search the documentation that is installed on this machine.

Example:
    python -m conan_engine.search runs/demo "roots of a polynomial" --count 5
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from conan_engine import atomic, command
from conan_engine.data.sources import docstrings, places
from conan_engine.data.sources.installed import HELD_OUT_PACKAGES, TRAINING_PACKAGES
from conan_engine.errors import UserError
from conan_engine.evaluation.encoder import Encoder
from conan_engine.run import checkpoint


def main() -> None:
    parser = command.Parser("search", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, such as runs/demo, or a checkpoint's")
    parser.add_argument("text", metavar="TEXT", help="the query")
    parser.add_argument("--count", type=int, default=10, metavar="N", help="how many results to print")
    arguments = parser.parse_args()
    if not arguments.text.strip():
        raise UserError("TEXT is empty; say in a few words what the function does")
    if arguments.count < 1:
        raise UserError(f"--count is {arguments.count}; expected at least 1")
    sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal can show all characters of documentation
    encoder = Encoder.load(arguments.run)
    documents, vectors = index(encoder, arguments.run)
    scores = vectors @ encoder.encode([arguments.text])[0]
    for i in np.argsort(-scores, kind="stable")[: arguments.count]:
        name, place, summary = documents[i]
        print(f"{scores[i]:.3f}  {name}  {place.removeprefix(f'{Path.cwd()}/')}\n       {summary}")


def index(encoder: Encoder, run: str | Path) -> tuple[list[list[str]], np.ndarray]:
    """The documents, [name, place, start of the summary] each, and their unit vectors [N, width].

    They are kept in the run's folder until the weights or the files of documentation change. If that folder cannot be
    written, a line says so.
    """
    every = TRAINING_PACKAGES + HELD_OUT_PACKAGES
    packages = [package for package in every if package == "stdlib" or places.installed(package)]
    files = [path for package in packages for path, _ in docstrings.modules(package)]
    folder, _ = checkpoint.newest(run)
    of = [
        folder.name,
        (folder / "state.json").read_text(),
        *(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files),
    ]
    path = Path(run, f"search-{hashlib.blake2b(repr(of).encode(), digest_size=8).hexdigest()}.npz")
    if path.exists():
        with np.load(path) as kept:
            return json.loads(kept["documents"].tobytes()), kept["vectors"]
    print(f"reading {len(files):,} files of documentation, once ...", flush=True)
    docs = [doc for doc in docstrings.read(packages) if doc.rest]
    print(f"embedding {len(docs):,} documents, once ...", flush=True)
    vectors = encoder.encode([f"{doc.summary}\n{doc.rest}" for doc in docs])
    documents = [[doc.name, f"{doc.path}:{doc.line}", doc.summary[:100]] for doc in docs]
    try:
        atomic.write(
            path,
            lambda file: np.savez(
                file, documents=np.frombuffer(json.dumps(documents).encode(), np.uint8), vectors=vectors
            ),
        )
    except UserError as error:  # a run in a read-only folder can be searched too
        print(f"{error}; the next search embeds them again", flush=True)
        return documents, vectors
    for old in set(Path(run).glob("search-*")) - {path}:
        old.unlink()
    return documents, vectors


if __name__ == "__main__":
    command.run(main)
