"""Turn a source into token shards, unit by unit: each is read, filtered, encoded and written by itself, by any
process.

All units together are the source's shards. What a unit holds depends only on its files and the settings.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from conan_engine.atomic import write_json
from conan_engine.data import encoding, field_scores, known
from conan_engine.data.job import Job, unit_name
from conan_engine.data.rejects import NAME, Rejects, by_reason, judge
from conan_engine.data.scores import Scores
from conan_engine.data.shard_writer import ShardWriter, join
from conan_engine.data.shards import Shards
from conan_engine.data.sources import files
from conan_engine.data.unit_records import kept, records_of, rendered
from conan_engine.errors import UserError

if TYPE_CHECKING:
    from conan_engine.data.sources.paths import Piece


REPORT = "report.json"


def make(tokenizer: Any, job: Job, number: int, pieces: list[Piece], report: Callable) -> None:
    """Write a unit unless it is there. Waits for another process that is writing it.

    pieces: the Pieces of files in it. report: called now and then with the bytes read and tokens written so far. Raises
    UserError, naming file and line.
    """
    folder = job.unit(number)
    with _alone(job.folder, number):
        if job.finished(number):
            return
        folder.mkdir(parents=True, exist_ok=True)
        rejects = (
            None
            if job.max_bad_share is None
            else Rejects(folder / NAME, job.source, job.use, job.max_bad_share if number == 0 else None)
        )
        reader = files.Reader(pieces, job.about.columns, rejects)
        about: dict[str, Any] = {
            "kind": "",
            "file": str(pieces[0].path),
            "read": 0,
            "below_min_score": 0,
            "too_long": 0,
        }
        with ShardWriter(
            folder, kind=job.shape, tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size, may_be_empty=True
        ) as writer:
            tokens, records = 0, records_of(job, reader, about)
            if job.use == "sft" and tokenizer.template:
                records = rendered(records, reader, tokenizer)
            records = _counted(records, rejects, about)
            if job.use == "weak":
                records = kept(records, job, about, Scores(job, unit_name(number)) if job.teacher else None)
            scores = field_scores.FieldScores(folder) if job.use == "supervised" else None
            for batch in encoding.batches(records):
                encoded = encoding.encode(tokenizer, job.shape, batch, job.stage.max_tokens)
                writer.add_records(encoded)
                if scores:
                    scores.add(batch)
                about["too_long"] += max(0, len(batch) - len(encoded.record_fields))
                tokens += len(encoded.tokens)
                report(reader.behind, tokens)
            if rejects:
                rejects.close()
            write_json(folder / REPORT, {**about, "left_out": rejects.reasons if rejects else {}})


@contextlib.contextmanager
def _alone(folder, number):
    """Let no two processes work on a unit, where the file system has locks."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        with contextlib.suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX, 1, number)
        yield


def _counted(records, rejects, about):
    for record in records:
        about["read"] += 1
        if rejects:
            rejects.kept += 1
        yield record


def score(device: str | None, job: Job, number: int, pieces: list[Piece], report: Callable) -> None:
    """Compute the teacher's scores of a unit, ahead of `make`."""
    if job.finished(number):
        return
    with _alone(job.scores, number):
        reader = files.Reader(
            pieces, job.about.columns, (lambda *what: None) if job.max_bad_share is not None else None
        )
        records = records_of(job, reader, {"kind": ""})
        for done, _ in enumerate(Scores(job, unit_name(number), device)(records)):
            if done % 256 == 0:
                report(reader.behind, 0)


def finish(job: Job, count: int) -> Shards:
    """Join the `count` finished units of a job, and return its Shards. Raises UserError if they are of several
    kinds, too much was left out, or nothing is there.
    """
    if not job.finished():
        units = [unit_name(number) for number in range(count)]
        report = _joined(job, [json.loads((job.folder / unit / REPORT).read_text(encoding="utf-8")) for unit in units])
        if report["left_out"]:
            if job.max_bad_share is None:
                first = json.loads(next(line for path in rejected(job) for line in path.open(encoding="utf-8")))
                line = next(
                    f"{key} {value}" for key, value in first.items() if key not in ("use", "source", "file", "reason")
                )
                raise UserError(f"{first['file']}: {line}: {first['reason']}")
            listed = job.folder.parent / NAME
            judge(job.source, report["read"], report["left_out"], job.max_bad_share, listed)
            bad = sum(report["left_out"].values())
            print(
                f"{job.source}: left out {bad} of {report['read'] + bad} records for {job.use}: "
                f"{by_reason(report['left_out'])}; see {listed}",
                file=sys.stderr,
                flush=True,
            )
        if report["too_long"]:
            long = (
                f"{report['too_long']:,} of {report['read']:,} conversations have a first question longer "
                f"than {job.use}.max_tokens = {job.stage.max_tokens}"
            )
            if report["too_long"] == report["read"]:
                raise UserError(f"{job.source}: {long}: there is nothing to learn; raise it")
            print(f"{job.source}: {long} and are left out", file=sys.stderr, flush=True)
        write_json(job.folder / REPORT, report)
        scores = field_scores.join(job.folder, units)
        if not join(job.folder, units, **({} if scores is None else {"field_scores": scores})):
            if report["below_min_score"]:
                judged = f"weak.teacher {job.teacher!r}" if job.teacher else 'its own "score"'
                raise UserError(
                    f"{job.source}: {judged} puts every pair below weak.min_score = {job.stage.min_score}; "
                    "lower it, or give other data"
                )
            raise files.nothing_in(job.source)
    found = Shards(job.folder)
    if found.kind == "pairs" and job.use != "texts":
        known.make(found)
    return found


def rejected(job: Job) -> list:
    """The files that list the bad records of its units."""
    return sorted(job.folder.glob(f"unit-*/{NAME}"))


def _joined(job, reports):
    """The reports of all units as one."""
    found = [report for report in reports if report["kind"]]
    for report in found:
        if report["kind"] != found[0]["kind"]:
            raise UserError(
                f"{report['file']}: holds {report['kind']} records, and {found[0]['file']} {found[0]['kind']} "
                "records; make each kind a source of its own"
            )
    left_out = sum((collections.Counter(report["left_out"]) for report in reports), collections.Counter())
    return {
        **{key: sum(report.get(key, 0) for report in reports) for key in ("read", "below_min_score", "too_long")},
        "left_out": left_out,
    }
