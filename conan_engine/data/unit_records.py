"""The records of a unit in the form that its use needs.

Pairs come from instructions, conversations and labels, too; `texts` takes each text by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from conan_engine.data import chat_template, encoding
from conan_engine.data.sources.bad import Bad
from conan_engine.errors import UserError

if TYPE_CHECKING:
    from conan_engine.data.job import Job
    from conan_engine.data.sources.files import Reader


# The kinds of records that each use accepts.
TAKES = {
    "pretrain": ("text", "instruction", "chat"), "sft": ("instruction", "chat"),
    "weak": ("pairs", "instruction", "chat"),
    "supervised": ("pairs", "label", "instruction", "chat"), "sts": ("sts",), "texts": ("pairs", "instruction", "text"),
}  # fmt: skip


def records_of(job: Job, reader: Reader, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The records that `reader` reads, in the form that the job's use needs; their kind is noted in `about`.

    Raises UserError for a kind that the use does not take.
    """
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


def rendered(records: Iterable[dict[str, Any]], reader: Reader, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Conversations as the chat template writes them; one that it refuses is bad."""
    for record in records:
        if "messages" in record:
            try:
                record = {**record, "rendered": chat_template.render(tokenizer, record["messages"])}
            except Bad as bad:
                reader.leave_out(bad)
                continue
        yield record


def kept(
    records: Iterable[dict[str, Any]], job: Job, about: dict[str, Any], scored: Callable | None
) -> Iterator[dict[str, Any]]:
    """The pairs whose score is at least `min_score`; a pair without a score stays. The others are counted in `about`.

    scored: gives each record and its score by the teacher; None: the records' own count.
    """
    for record, value in (
        scored(records) if scored else ((record, record.get("score", job.stage.min_score)) for record in records)
    ):
        if value >= job.stage.min_score:
            yield {**record, "score": value}
        else:
            about["below_min_score"] += 1


def _of_kind(job, reader, about):
    """First the kind, which is noted in `about`; then the records."""
    for kind, record in reader:
        if not about["kind"]:
            if kind not in TAKES[job.use]:
                raise UserError(f"{job.source}: holds {kind} records; {job.use} takes {' or '.join(TAKES[job.use])}")
            about["kind"] = kind
            yield kind
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
