"""Search the documentation installed on this machine: `python -m conan_engine.search RUN "text"`."""

import argparse
import hashlib
import sys
from pathlib import Path

import numpy as np

from conan_engine import checkpoint, errors
from conan_engine.data.sources import docstrings
from conan_engine.data.sources.installed import HELD_OUT_PACKAGES, TRAINING_PACKAGES
from conan_engine.encoder import Encoder
from conan_engine.errors import UserError


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run folder, such as runs/demo")
    parser.add_argument("text", help="what to look for")
    parser.add_argument("--count", type=int, default=10, help="how many to print (default: 10)")
    arguments = parser.parse_args()
    if not arguments.text.strip():
        raise UserError("the text to look for is empty; say in a few words what the function does")
    if arguments.count < 1:
        raise UserError(f"--count is {arguments.count}; ask for at least 1")
    sys.stdout.reconfigure(errors="backslashreplace")  # documentation holds what not every terminal can show
    encoder = Encoder.load(arguments.run)
    docs = list(docstrings.read(TRAINING_PACKAGES + HELD_OUT_PACKAGES))
    vectors = document_vectors(encoder, docs, arguments.run)
    scores = vectors @ encoder.encode([arguments.text])[0]
    for i in np.argsort(-scores, kind="stable")[: arguments.count]:
        print(f"{scores[i]:.3f}  {docs[i].name}  {docs[i].path}:{docs[i].line}\n       {docs[i].summary[:100]}")


def document_vectors(encoder, docs, run):
    """One unit vector a document, kept in the run's folder until the weights or the documentation change; where that
    folder cannot be written, a line says so."""
    texts = [f"{doc.summary}\n{doc.rest}" for doc in docs]
    folder, _ = checkpoint.newest(run)
    key = hashlib.blake2b("\0".join([folder.name, (folder / "state.json").read_text(), *texts]).encode("utf-8", "replace"), digest_size=8)
    path = Path(run, f"search-{key.hexdigest()}.npy")
    if path.exists():
        return np.load(path)
    print(f"embedding {len(docs):,} documents, once ...", flush=True)
    vectors = encoder.encode(texts)
    try:
        save_beside(path, vectors)
    except UserError as error:  # someone else's run can be searched too
        print(f"{error}; the next search embeds them again", flush=True)
        return vectors
    for old in set(Path(run).glob("search-*.npy")) - {path}:
        old.unlink()
    return vectors


def save_beside(path, array):
    """np.save that leaves no half-written file behind. Raises UserError where `path` cannot be written."""
    partial = Path(f"{path}.partial.npy")
    try:
        np.save(partial, array)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write it ({error.strerror}); name a folder that exists and has room") from None


if __name__ == "__main__":
    errors.run(main)
