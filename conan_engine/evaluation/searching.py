"""The vectors of a corpus, and an index of them, made by all ranks together and kept for the next search."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from conan_engine.atomic import write_json
from conan_engine.errors import UserError
from conan_engine.parallel.mesh import Group
from conan_engine.vectors import nearest
from conan_engine.vectors.blocks import Blocks, until
from conan_engine.vectors.making import Making
from conan_engine.vectors.quantize import stored_as
from conan_engine.vectors.store import INDEX, Store, read_json
from conan_engine.vectors.stored import Stored

if TYPE_CHECKING:
    import torch

    from conan_engine.evaluation.encoder import Encoder
    from conan_engine.vectors.corpus import Corpus
    from conan_engine.vectors.making import Share
    from conan_engine.vectors.nearest import Rule, Search


PRECISION = "float16"  # an error of 0.0005 of a number, for half of the bytes


def vectors_of(encoder: Encoder, corpus: Corpus, folder: Path, dim: int, share: Share) -> Stored:
    """The vectors of a corpus in `folder`, which are made there unless they are those of this corpus and model.

    Raises UserError as Making.run does.
    """
    about = encoder.about(corpus, dim, PRECISION)
    store = Store(folder, *stored_as(PRECISION, dim))
    if share.rank == 0:
        store.renew(about)
        if store.complete(about) is None:
            for line in Making(encoder.reading(corpus), store, share, encoder.windows(dim), PRECISION).run(about):
                print(line, flush=True)
    elif store.wait(about):
        Making(encoder.reading(corpus), store, share, encoder.windows(dim), PRECISION).run(about)
    until(lambda: read_json(folder / INDEX) is not None)
    return Stored(folder, encoder.model.config.width)


def home(folder: Path, share: Share, temporary: Path) -> Path:
    """Where to keep what is made: `folder`, or `temporary` if it cannot be written. Raises UserError if ranks
    share it.
    """
    if os.access(folder, os.W_OK):
        return folder
    if share.world > 1:
        raise UserError(f"{folder}: cannot be written, and ranks share the work there; make it writable")
    print(f"{folder}: cannot be written, so nothing is kept for the next search", flush=True)
    return temporary


def index_of(stored: Stored, rule: Rule, device: torch.device, share: Share, temporary: Path) -> Search:
    """What searches the vectors. An index is kept beside them, or made in `temporary` if it cannot be.

    Raises UserError as nearest.searcher does.
    """
    mesh = Group(device, share.rank, share.world)
    if rule.index == "Flat":
        return nearest.exact(stored, device, bar=share.rank == 0)
    made_of = stored.path / INDEX if stored.path.is_dir() else stored.path
    of = {"index": rule.index, "vectors": [made_of.stat().st_size, made_of.stat().st_mtime_ns]}
    name = f"index-{hashlib.blake2b(rule.index.encode(), digest_size=4).hexdigest()}"
    folder = Store(stored.path, "float32", 1).beside(name)
    about = folder / "about.json"
    if read_json(about) != of:
        folder = home(folder.parent, share, temporary) / folder.name
        about = folder / "about.json"
    if share.rank == 0 and read_json(about) != of:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_json(about, of)
    until(lambda: read_json(about) == of)
    blocks = Blocks(folder, stored.path.name, mesh)
    blocks.begin()
    try:
        return nearest.searcher(stored, rule, folder, blocks)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write here ({error.strerror}); make room, then run again: what is finished is kept"
        ) from None
