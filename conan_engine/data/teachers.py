"""Teachers for the weak stage: callables that score (queries, documents), two lists of text, and give a number each.

`weak.teacher` names one: "module:function" for your own; "sentence-transformers:FOLDER" or "cross-encoder:FOLDER" for a model on disk.
What is kept of them are their scores (data/scores-...), by name: a teacher that has changed under its name scores anew where these are deleted.
"""

import fcntl
import functools
import importlib
import os
from pathlib import Path

import numpy as np

from conan_engine.errors import UserError


def plausible(queries, documents):
    """Whether a pair can be a text and its counterpart at all, from its form alone: 0 for a copy or for fewer than four
    characters on a side, else the shorter length over the longer, where a document may be up to 20 times the query."""
    return [_score(query.strip(), document.strip()) for query, document in zip(queries, documents)]


def _score(query, document):
    if query == document or len(query) < 4 or len(document) < 4:
        return 0.0
    ratio = len(document) / len(query)
    if 1 / 4 <= ratio <= 20:  # a Chinese sentence is about a third as long, in characters, as its English original
        return 1.0
    return min(ratio * 4, 20 / ratio)


def is_model(name):
    """Whether a teacher is one that wants a GPU for itself."""
    return name.partition(":")[0] in MODELS


def gpus():
    """How many this machine has."""
    import torch

    return torch.cuda.device_count()


def own_device(name, processes):
    """For one of several processes that score: a GPU that no other has, by locks on files beside `name`, held until the process ends; or
    its share of the cores."""
    import torch

    for i in range(torch.cuda.device_count()):
        lock = open(f"{name}-gpu-{i}", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        _held.append(lock)
        return f"cuda:{i}"
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))


_held = []


def load(name, device=None):
    """The teacher of this name; device: where a model computes (None: wherever it likes). Raises UserError if there is none."""
    module, _, rest = name.partition(":")
    try:
        if module in MODELS:
            return _model(module, rest, device)
        return getattr(importlib.import_module(module), rest)
    except (ImportError, AttributeError, ValueError) as error:
        wanted = f"pip install sentence-transformers, or check {rest}" if module in MODELS else "expected \"module:function\""
        raise UserError(f"weak.teacher: cannot load {name!r} ({' '.join(str(error).split())}); {wanted}") from None


@functools.lru_cache(1)  # they are large
def _model(kind, folder, device):
    if not Path(folder).is_dir():
        raise UserError(f"weak.teacher: {folder}: no such folder; give the path of a model that is on disk")
    return MODELS[kind](folder, device)


def _cosines(folder, device):
    """Of the vectors of a sentence-transformers model, as it encodes queries and documents."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device=device, local_files_only=True)

    def score(queries, documents):
        ours, theirs = (
            encode(texts, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False) for encode, texts in ((model.encode_query, queries), (model.encode_document, documents))
        )
        return np.einsum("nd,nd->n", ours, theirs, dtype=np.float64)

    return score


def _judgements(folder, device):
    """Of a cross-encoder with one output, through the sigmoid."""
    import torch
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(folder, device=device, local_files_only=True)
    if model.num_labels != 1:
        raise ValueError(f"it has {model.num_labels} outputs where a judge of pairs has one")

    def score(queries, documents):
        return model.predict(list(zip(queries, documents)), activation_fn=torch.nn.Sigmoid(), show_progress_bar=False)

    return score


MODELS = {"sentence-transformers": _cosines, "cross-encoder": _judgements}
