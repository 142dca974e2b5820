"""Build the tokenizer and the token shards of a config's sources, each source once, unit by unit, on all cores."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from conan_engine.config import TABLES, Source
from conan_engine.data import teachers, units
from conan_engine.data.job import Job
from conan_engine.data.rejects import NAME, TooMany
from conan_engine.data.sources import files, installed, paths
from conan_engine.data.sources.processes import Pool
from conan_engine.data.tokenizer import Tokenizer, train
from conan_engine.data.unit_records import TAKES
from conan_engine.errors import UserError

if TYPE_CHECKING:
    from conan_engine.config import Tokenizer as TokenizerSettings
    from conan_engine.data.shards import Shards
    from conan_engine.data.tokenizer import AnyTokenizer


GOLDEN = (5**0.5 - 1) / 2
# The tokenizer is trained on the first so many bytes of the files of at most so many units of a source.
HEADS, HEAD = 64, 8 * 2**20


def built_in(source: str, use: str) -> str | None:
    """The kind of records that a built-in source gives a use, or None for a path. Raises UserError if it gives none."""
    kinds = [kind for name, kind in installed.READERS if name == source]
    for kind in TAKES[use] if kinds else ():
        if kind in kinds:
            return kind
    if kinds:
        raise UserError(f"{source}: holds {' or '.join(kinds)} records; {use} takes {' or '.join(TAKES[use])}")
    return None


def fits(source: str, about: Source, uses: Iterable[str], skip: bool = False) -> tuple[list[str], list[str]]:
    """(the `uses` that accept a source's kinds of records, these kinds). skip: leave out bad records."""
    kinds = [kind for name, kind in installed.READERS if name == source]
    if not kinds:
        kind, _ = next(files.read(source, about.columns, _nothing if skip else None))
        kinds = [kind]
    return [use for use in uses if set(TAKES[use]) & set(kinds)], kinds


def _nothing(*_):
    """Ignore a bad record; it is reported later."""


def read(source: str, use: str, about: Source | None = None) -> tuple[str, Iterable[Any]]:
    """The records of a source (a built-in name or a path) for a use (a key of TAKES): (kind, iterator of dicts).

    about: the config's Source. Raises UserError if the source is unknown or its records do not fit the use.
    """
    kind = built_in(source, use)
    if kind:
        return kind, installed.READERS[source, kind]()
    records = files.read(source, about.columns if about else None)
    kind, first = next(records)
    if kind not in TAKES[use]:
        raise UserError(f"{source}: holds {kind} records; {use} takes {' or '.join(TAKES[use])}")
    return kind, itertools.chain([first], (record for _, record in records))


def texts(source: str, use: str, about: Source | None = None, skip: bool = False) -> Iterator[str]:
    """Every text of a source for the tokenizer; with many units, the beginning of some. skip: leave out bad records."""
    for record in _to_learn_from(source, use, about, skip):
        for value in record.values():
            if isinstance(value, str):
                yield value
            elif isinstance(value, list):
                yield from (
                    item["content"] if isinstance(item, dict) else item
                    for item in value
                    if not isinstance(item, float | int)
                )


def _to_learn_from(source, use, about, skip):
    kind = built_in(source, use)
    if kind:
        yield from installed.READERS[source, kind]()
        return
    cut, none = paths.cut(source), True
    for i in range(min(len(cut), HEADS)):
        reader = files.Reader(
            cut[i * len(cut) // min(len(cut), HEADS)], about and about.columns, _nothing if skip else None
        )
        for _, record in reader:
            yield record
            none = False
            if reader.behind > HEAD:
                break
    if none:
        raise files.nothing_in(source)


def make_tokenizer(
    settings: TokenizerSettings, sources: list[tuple], run: str | Path, skip: bool = False
) -> AnyTokenizer:
    """Load `settings.path`, or the tokenizer in the folder `run`, or train one on `sources`; then keep it in that
    folder.

    sources: a list of (source, use, Source). skip: leave out bad records.
    """
    path = Tokenizer.of(run)
    if settings.path:  # a run keeps a copy of its tokenizer
        tokenizer = Tokenizer.load(settings.path)
        if path is None or Tokenizer.load(path).hash != tokenizer.hash:
            Path(run).mkdir(parents=True, exist_ok=True)
            if path:
                path.unlink()
            tokenizer.save(run)
        return tokenizer
    path = path or Path(run, Tokenizer.FILE)
    if not path.exists():
        # a source with several uses is read for one of them
        sources = {source: (source, *how, skip) for source, *how in sources}.values()
        total = sum(len(text) for source in sources for text in texts(*source))
        if total == 0:
            raise UserError(
                f"the sources {', '.join(s for s, *_ in sources)} hold no text to train a tokenizer "
                "on; add text, or set tokenizer.path"
            )
        share = settings.train_bytes / total
        everything = (text for source in sources for text in texts(*source))
        # steps of the golden ratio sample all texts evenly, and all fields of a record (every third text would always
        # be the same field)
        train((text for i, text in enumerate(everything) if i * GOLDEN % 1 < share), path, settings.vocab_size)
    return Tokenizer.load(path)


def make_job(
    source: str, use: str, stage: Any, tokenizer: AnyTokenizer, folder: str | Path, max_bad_share: float | None = None
) -> Job:
    """The Job of a source for a use. Its shards get a folder under `folder`, and the teacher's scores another."""
    about = getattr(stage, use if use in TABLES else "data").get(source) or Source()
    kind = built_in(source, use)
    reads = str(Path(folder, ".built-in", f"{source}-{kind}.jsonl")) if kind else source
    # anything that would change the contents gives another folder
    teacher = stage.teacher if use == "weak" else ""
    facts = [source, use, about.columns, teacher, paths.UNIT, paths.MOST_UNITS, paths.MOST_STRIPES]
    if not kind:
        facts += [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths.of(source)]
    scores = Path(folder, f"scores-{_key(facts)}")
    facts += [tokenizer.template] if use == "sft" and tokenizer.template else []
    shards = Path(folder, f"{use}-{_key([*facts, stage.max_tokens, tokenizer.hash, getattr(stage, 'min_score', 0)])}")
    return Job(source, use, stage, about, shards, scores, reads, kind, max_bad_share)


def _key(facts):
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=6).hexdigest()


def make_shards(
    jobs: list[Job],
    tokenizer: AnyTokenizer,
    processes: int = 0,
    part: tuple[int, int] = (1, 1),
    elsewhere: Callable | None = None,
) -> dict[Path, Shards]:
    """Write the shards of Jobs that are not there yet: {a job's folder: Shards} of those that are complete.

    Args:
        jobs: what to write.
        tokenizer: that encodes the texts.
        processes: how many; 0 means one per core.
        part: (i, k), to do the i-th of k parts of all work; other starts do the others.
        elsewhere: elsewhere(function, items, look, gpu) does the work in place of processes here, as Pool.unordered
            does, with a GPU each if there are any.

    A stopped start keeps what it has finished. A unit that fails is reported at once; the others are finished, and then
    UserError is raised.
    """
    jobs = list({job.folder: job for job in jobs}.values())
    planned, counts, todo = [], {}, []
    for job in jobs:
        cut = job.units()
        counts[job.folder] = len(cut)
        planned += [(job, number, pieces) for number, pieces in enumerate(cut)]
    for i, (job, number, _) in enumerate(planned):
        if i % part[1] == part[0] - 1 and not job.finished() and not job.finished(number):
            todo.append(planned[i])
    found, news = {}, not all(job.finished() for job in jobs)
    try:
        judged = [task for task in todo if teachers.is_model(task[0].teacher)]
        if judged:
            _work(units.score, None, judged, teachers.gpus() or processes, elsewhere)
        _work(units.make, tokenizer, todo, processes, elsewhere)
        for job in jobs:
            if job.finished() or all(job.finished(number) for number in range(counts[job.folder])):
                found[job.folder] = units.finish(job, counts[job.folder])
    finally:
        if news:
            _list_rejected(jobs)
    if news and len(found) == len(jobs):
        for path in {Path(job.reads) for job in jobs if job.reads != job.source}:
            path.unlink(missing_ok=True)
    return found


def _work(function, given, todo, processes, elsewhere):
    """Call function(given, job, number, pieces, report), units.make or units.score, for these units; then raise the
    first failure, in their order.
    """
    failed, stopped = {}, False
    with Progress(todo, "scoring pairs" if function is units.score else "preparing data") as progress:
        items = [(i, *task) for i, task in enumerate(todo)]
        if elsewhere:
            results = elsewhere(
                functools.partial(_attempt, function, given, progress.path),
                items,
                progress.look,
                function is units.score,
            )
        elif len(todo) == 1 or processes == 1:
            if function is units.make:
                given.threads = processes or -1
            results = ((item[0], _attempt(function, given, progress.path, item, progress.look)) for item in items)
        else:
            results = _on_processes(function, given, items, processes, progress)
        with contextlib.closing(results):
            for i, result in results:
                if result:
                    failed[i], stopped = result
                    if stopped:
                        break
                    if len(todo) > 1:
                        tqdm.write(f"{failed[i]}\n  the others go on", file=sys.stderr)
    if failed:
        raise UserError(
            failed[min(failed)]
            + (
                f" ({len(failed)} of {len(todo)} units failed; the others are finished)"
                if len(failed) > 1 and not stopped
                else ""
            )
        )


def _on_processes(function, given, items, processes, progress):
    processes = min(processes or len(os.sched_getaffinity(0)), len(items))
    with Pool(processes, _set_up, function, given, progress.path, processes) as pool:
        yield from pool.unordered(_attempt_here, items, progress.look)


def _set_up(function, given, progress, processes):
    global _shared  # of one process
    if function is units.score:
        given = teachers.own_device(progress, processes)
    else:
        given.threads = 1
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the same for that library
    _shared = function, given, progress


def _attempt_here(item):
    return _attempt(*_shared, item)


def _attempt(function, given, progress, item, look=lambda: None):
    """Work on a unit. Returns None, or (what is wrong with it, whether that ends all work)."""
    slot, job, number, pieces = item
    handle = os.open(progress, os.O_WRONLY)

    def report(read, tokens):
        os.pwrite(handle, struct.pack("qq", read, tokens), 16 * slot)
        look()

    try:
        function(given, job, number, pieces, report)
    except UserError as error:
        return str(error), isinstance(error, TooMany)
    finally:
        os.close(handle)


class Progress:
    """A bar over the bytes of all units. A file holds two numbers per unit: bytes read, tokens written."""

    def __init__(self, todo: list[tuple], doing: str) -> None:
        self.doing = doing
        self.sizes = [sum(piece.bytes for piece in pieces) for _, _, pieces in todo]
        self.bar: Any = None
        self.path = todo and todo[0][0].folder.parent / f".progress-{socket.gethostname()}-{os.getpid()}"

    def look(self) -> None:
        numbers = struct.unpack(f"{2 * len(self.sizes)}q", self.path.read_bytes())
        read = sum(min(size, read) for size, read in zip(self.sizes, numbers[::2]))
        if any(numbers[1::2]):
            self.bar.set_postfix_str(f"{sum(numbers[1::2]):,} tokens", refresh=False)
        self.bar.update(read - self.bar.n)

    def __enter__(self):
        if self.sizes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(bytes(16 * len(self.sizes)))
            self.bar = tqdm(
                desc=self.doing, total=sum(self.sizes), unit="B", unit_scale=True, leave=False, mininterval=1
            )
        return self

    def __exit__(self, *_):
        if self.sizes:
            self.bar.close()
            for path in self.path.parent.glob(f"{self.path.name}*"):
                path.unlink(missing_ok=True)


def _list_rejected(jobs):
    """Write the bad records of all jobs into one file beside their folders."""
    path = jobs[0].folder.parent / NAME if jobs else None
    listed = [file for job in jobs for file in units.rejected(job)]
    if listed:
        partial = path.with_name(f"{NAME}.{os.getpid()}.partial")
        with open(partial, "wb") as whole:
            for file in listed:
                whole.write(file.read_bytes())
        partial.replace(path)
    elif path:
        path.unlink(missing_ok=True)
