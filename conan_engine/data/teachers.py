"""Teachers: functions that score pairs, called with two lists of text, queries and documents.

Some also have vectors, by the methods queries(texts) and documents(texts), which return an array [n, D]. `weak.teacher`
and `supervised.teacher` name one: "module:function" for your own, "sentence-transformers:FOLDER" or
"cross-encoder:FOLDER" for a model on disk. Answers are kept by the teacher's name (data/scores-..., negatives/...,
texts/...). Delete them if a teacher has changed under its name.
"""

from __future__ import annotations

import fcntl
import functools
import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from conan_engine.errors import UserError


def plausible(queries: list[str], documents: list[str]) -> list[float]:
    """Whether two texts can be a pair at all, by their form: 0 for a copy, or fewer than four characters on a side;
    else the shorter length over the longer.

    A document may have up to 20 times the length of the query.
    """
    return [_score(query.strip(), document.strip()) for query, document in zip(queries, documents)]


def _score(query, document):
    if query == document or len(query) < 4 or len(document) < 4:
        return 0.0
    ratio = len(document) / len(query)
    if 1 / 4 <= ratio <= 20:  # a Chinese sentence has about a third of the characters of its English original
        return 1.0
    return min(ratio * 4, 20 / ratio)


def is_model(name: str) -> bool:
    """Whether a teacher is a model, which wants a GPU to itself."""
    return name.partition(":")[0] in MODELS


def gpus() -> int:
    """The number of GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def own_device(name: str, processes: int) -> str | None:
    """The device of one of several scoring processes: a GPU that no other has, or its share of the cores.

    The GPU is locked by a file beside `name` until the process ends.
    """
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
    return None


_held: list = []


def load(setting: str, name: str, device: str | None = None) -> Any:
    """Load a teacher. setting: the setting that names it; device: where a model computes, None for its own choice.
    Raises UserError.
    """
    module, _, rest = name.partition(":")
    try:
        if module not in MODELS:
            return getattr(importlib.import_module(module), rest)
        if not Path(rest).is_dir():
            raise UserError(f"{setting}: {rest}: no such folder; give the path of a model that is on disk")
        return _model(module, rest, device)
    except (ImportError, AttributeError, ValueError) as error:
        wanted = (
            f"pip install sentence-transformers, or check {rest}" if module in MODELS else 'expected "module:function"'
        )
        raise UserError(f"{setting}: cannot load {name!r} ({' '.join(str(error).split())}); {wanted}") from None


def scores(setting: str, name: str, queries: list[str], documents: list[str], device: str | None = None) -> np.ndarray:
    """A teacher's scores of pairs of texts: float64 [n]. Raises UserError unless it gives a finite number for each."""
    given = np.asarray(load(setting, name, device)(queries, documents), np.float64)
    if given.shape != (len(queries),):
        raise UserError(
            f"{setting}: {name} gave "
            f"{given.shape[0] if given.ndim == 1 else f'an array of shape {list(given.shape)}'} scores for "
            f"{len(queries)} pairs; it must score each"
        )
    if not np.isfinite(given).all():
        raise UserError(
            f"{setting}: {name} gave {given[~np.isfinite(given)][0]} for the query "
            f"{queries[int(np.argmin(np.isfinite(given)))][:60]!r}; scores are finite numbers"
        )
    return given


def has_vectors(setting: str, name: str, device: str | None = None) -> bool:
    return hasattr(load(setting, name, device), "documents")


def vectors(
    setting: str, name: str, texts: list[str], device: str | None = None, kind: str = "documents"
) -> np.ndarray:
    """A teacher's vectors of texts, as "queries" or "documents", at unit length: float32 [n, D].

    Raises UserError for a teacher without vectors, or with other than one for each text.
    """
    if not has_vectors(setting, name, device):
        raise UserError(
            f"{setting}: {name} gives only scores, but vectors are needed; expected "
            '"sentence-transformers:FOLDER", or an object with queries(texts) and documents(texts)'
        )
    given = np.asarray(getattr(load(setting, name, device), kind)(texts), np.float32)
    if given.ndim != 2 or len(given) != len(texts) or not np.isfinite(given).all():
        raise UserError(
            f"{setting}: {name} gave an array of shape {list(given.shape)} for {len(texts)} texts; expected a "
            "finite vector for each"
        )
    return given / np.maximum(np.linalg.norm(given, axis=1, keepdims=True), 1e-12)


def forget() -> None:
    """Free the model and its memory."""
    _model.cache_clear()


@functools.lru_cache(1)  # models are large
def _model(kind, folder, device):
    return MODELS[kind](folder, device)


class _Cosines:
    """The vectors of a sentence-transformers model, and their cosines as scores."""

    def __init__(self, folder, device):
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(folder, device=device, local_files_only=True)

    def queries(self, texts):
        return self.model.encode_query(texts, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False)

    def documents(self, texts):
        return self.model.encode_document(
            texts, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )

    def __call__(self, queries, documents):
        return np.einsum("nd,nd->n", self.queries(queries), self.documents(documents), dtype=np.float64)


def _judgements(folder, device):
    """The scores of a cross-encoder with one output, through the sigmoid."""
    import torch
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(folder, device=device, local_files_only=True)
    if model.num_labels != 1:
        raise ValueError(f"it has {model.num_labels} outputs where a judge of pairs has one")

    def score(queries, documents):
        return model.predict(list(zip(queries, documents)), activation_fn=torch.nn.Sigmoid(), show_progress_bar=False)

    return score


MODELS = {"sentence-transformers": _Cosines, "cross-encoder": _judgements}
