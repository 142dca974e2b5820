"""Turn a source into token shards, unit by unit: each is read, filtered, encoded and written by itself, by any
process.

All units together are the source's shards. What a unit holds depends only on its files and the settings.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from conan_engine.config import Source
from conan_engine.data import chat_template, encoding, field_scores, known
from conan_engine.data.rejects import NAME, Rejects, by_reason, judge
from conan_engine.data.scores import Scores
from conan_engine.data.shards import MANIFEST, Shards, ShardWriter, join, write_json
from conan_engine.data.sources import files, installed, paths
from conan_engine.data.sources.bad import Bad
from conan_engine.errors import UserError

if TYPE_CHECKING:
    from conan_engine.data.sources.paths import Piece


REPORT = "report.json"

# The kinds of records that each use accepts.
TAKES = {
    "pretrain": ("text", "instruction", "chat"), "sft": ("instruction", "chat"),
    "weak": ("pairs", "instruction", "chat"),
    "supervised": ("pairs", "label", "instruction", "chat"), "sts": ("sts",), "texts": ("pairs", "instruction", "text"),
}  # fmt: skip


class Job(NamedTuple):
    """The work on a source for a use.

    source: a built-in name, or a path. use: a key of TAKES. stage: that stage's settings. about: the source's. folder:
    of its shards. scores: the folder of the teacher's scores. reads: the path that is read; a built-in source is
    written out there first. kind: of a built-in source's records. max_bad_share: leave out bad records up to this
    share; None: the first one raises UserError.
    """

    source: str
    use: str
    stage: Any
    about: Source
    folder: Path
    scores: Path
    reads: str
    kind: str | None
    max_bad_share: float | None

    @property
    def shape(self) -> str:
        """The kind of its shards."""
        return {"pretrain": "text", "sft": "instruction", "sts": "sts"}.get(self.use, "pairs")

    @property
    def teacher(self) -> str:
        """The teacher that scores its pairs, or ""."""
        return self.stage.teacher if self.use == "weak" else ""

    def unit(self, number: int) -> Path:
        """The folder of a unit."""
        return self.folder / name(number)

    def units(self) -> list:
        """The pieces of files in each unit. For a complete job, empty lists, one per unit folder."""
        if self.finished():
            return [[]] * len(list(self.folder.glob("unit-*")))
        if self.reads != self.source:
            self._write_out()
        return paths.cut(self.reads)

    def _write_out(self):
        """Write the records of a built-in source to a file of lines: read once, for all processes."""
        path = Path(self.reads)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            with open(partial, "w", encoding="utf-8") as file:
                for record in installed.READERS[self.source, self.kind]():
                    file.write(json.dumps(record) + "\n")
            partial.replace(path)

    def finished(self, number: int | None = None) -> bool:
        """Whether it, or one unit of it, is complete."""
        return ((self.folder if number is None else self.unit(number)) / MANIFEST).exists()


def name(number: int) -> str:
    """The name of a unit's folder."""
    return f"unit-{number:06d}"


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
            tokens, records = 0, _records(job, reader, about)
            if job.use == "sft" and tokenizer.template:
                records = _rendered(records, reader, tokenizer)
            records = _counted(records, rejects, about)
            if job.use == "weak":
                records = _kept(records, job, about, Scores(job, name(number)) if job.teacher else None)
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


def _records(job, reader, about):
    """The records of a unit in the form that its use needs; their kind is noted in `about`."""
    records = _of_kind(job, reader, about)
    if next(records, None) is None:  # this reads the kind
        return
    if about["kind"] == "label":
        records = _label_pairs(records)
    elif job.use == "texts":
        records = _texts(records)
    elif about["kind"] in ("instruction", "chat") and job.shape == "pairs":
        records = _instruction_pairs(map(_as_instruction, records), reader)
    yield from records


def _of_kind(job, reader, about):
    """First the kind, which is noted in `about`; then the records."""
    for kind, record in reader:
        if not about["kind"]:
            if kind not in TAKES[job.use]:
                raise UserError(f"{job.source}: holds {kind} records; {job.use} takes {' or '.join(TAKES[job.use])}")
            about["kind"] = kind
            yield kind
        yield record


def _counted(records, rejects, about):
    for record in records:
        about["read"] += 1
        if rejects:
            rejects.kept += 1
        yield record


def _as_instruction(record):
    """Of a conversation, what comes before the first answer, and that answer."""
    if "messages" not in record:
        return record
    before = list(itertools.takewhile(lambda message: not message["learn"], record["messages"]))
    said = "\n".join(message["content"] for message in before if message["content"])
    return {"instruction": "", "input": said, "output": record["messages"][len(before)]["content"]}


def _instruction_pairs(records, reader):
    """Instruction and output as query and positive; a record with an empty side is bad."""
    for record in records:
        query = encoding.join(record["instruction"], record["input"])
        if query.strip() and record["output"].strip():
            yield {"query": query, "pos": [record["output"]]}
            continue
        reader.leave_out(
            Bad(
                "empty text",
                f"its {'output' if query.strip() else 'instruction and input'} is empty; there is nothing to embed "
                "in it: leave it out",
            )
        )


def _rendered(records, reader, tokenizer):
    """Conversations as the chat template writes them; one that it refuses is bad."""
    for record in records:
        if "messages" in record:
            try:
                record = {**record, "rendered": chat_template.render(tokenizer, record["messages"])}
            except Bad as bad:
                reader.leave_out(bad)
                continue
        yield record


def _texts(records):
    """Each text of the records by itself; both sides of a pair."""
    for record in records:
        if "text" in record:
            texts = [record["text"]]
        elif "output" in record:
            texts = [encoding.join(record["instruction"], record["input"]), record["output"]]
        else:
            texts = [record["query"], *record["pos"], *record.get("neg", ())]
        for text in filter(str.strip, texts):
            yield {"query": text, "pos": [""], "group": ""}


def _kept(records, job, about, scored):
    """The pairs whose score, by the teacher or their own, is at least `min_score`; a pair without a score stays."""
    for record, value in (
        scored(records) if scored else ((record, record.get("score", job.stage.min_score)) for record in records)
    ):
        if value >= job.stage.min_score:
            yield {**record, "score": value}
        else:
            about["below_min_score"] += 1


def score(device: str | None, job: Job, number: int, pieces: list[Piece], report: Callable) -> None:
    """Compute the teacher's scores of a unit, ahead of `make`."""
    if job.finished(number):
        return
    with _alone(job.scores, number):
        reader = files.Reader(
            pieces, job.about.columns, (lambda *what: None) if job.max_bad_share is not None else None
        )
        records = _records(job, reader, {"kind": ""})
        for done, _ in enumerate(Scores(job, name(number), device)(records)):
            if done % 256 == 0:
                report(reader.behind, 0)


def _label_pairs(records):
    """Classification as InfoNCE: the positive of a text is the text of its label, or every other time the last text
    of the class in the unit.

    The group is the class, so no other member counts as a negative.
    """
    last = {}
    for i, record in enumerate(records):
        text, label = record["text"], record["label"]
        yield {"query": text, "pos": [last[label] if i % 2 and label in last else label], "group": label}
        last[label] = text


def finish(job: Job, count: int) -> Shards:
    """Join the `count` finished units of a job, and return its Shards. Raises UserError if they are of several
    kinds, too much was left out, or nothing is there.
    """
    if not job.finished():
        units = [name(number) for number in range(count)]
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
