"""What a teacher answers of a unit's records, kept in a file: what stands there is not asked for again, whatever else is made anew, and that of a
process that was killed is no loss."""

import bisect
import functools
import itertools
import json
import os
from pathlib import Path

import numpy as np

from conan_engine.data import encoding, teachers
from conan_engine.data.shards import write_json
from conan_engine.errors import UserError

LIST = "vectors.json"  # in a folder of shards: the files of its units' vectors


class Answers:
    """Of one unit. device: where a model computes."""

    def __init__(self, job, number, device=None):
        self.name, self.device = job.teacher, device
        self.path = job.scores / f"unit-{number:06d}{self.suffix}"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, records):
        """(record, answer) of each of the items that the records have."""
        row = self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))
        have = self.path.stat().st_size // row if self.path.exists() else 0
        with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            for batch in encoding.batches(self.items(records)):
                known = file.read(row * min(have, len(batch)))
                have -= len(known) // row
                answers = np.frombuffer(known, self.dtype).reshape(-1, *self.shape)
                if len(answers) < len(batch):
                    given = self.ask(batch[len(answers) :]).astype(self.dtype)
                    file.write(given.tobytes())  # over a part of one, too
                    file.flush()
                    answers = np.concatenate((answers, given))
                yield from zip(batch, answers)


class Scores(Answers):
    """A number for a query with each of its positives."""

    suffix, dtype, shape = ".f64", np.dtype(np.float64), ()

    def items(self, records):
        return ({**record, "pos": [positive]} for record in records for positive in record["pos"])

    def ask(self, batch):
        return teachers.scores("weak.teacher", self.name, [r["query"] for r in batch], [r["pos"][0] for r in batch], self.device)


class Vectors(Answers):
    """The teacher's unit vector of each text, a document to it."""

    suffix, dtype = ".f16", np.dtype(np.float16)

    @functools.cached_property
    def shape(self):
        return (teachers.vectors("weak.teacher", self.name, ["a text"], self.device).shape[1],)

    def items(self, records):
        return records

    def ask(self, batch):
        return teachers.vectors("weak.teacher", self.name, [r["query"] for r in batch], self.device)


def list_vectors(job, count):
    """Beside a job's shards, where the vectors of its `count` units are."""
    files = [os.path.relpath(Vectors(job, number).path, job.folder) for number in range(count)]
    write_json(job.folder / LIST, [file for file in files if (job.folder / file).stat().st_size])


class Targets:
    """The vectors of all records of a folder of shards, mapped. width: their numbers."""

    def __init__(self, shards):
        folder = shards.directory
        try:
            files = [folder / file for file in json.loads((folder / LIST).read_text(encoding="utf-8"))]
            numbers = [file.stat().st_size // 2 for file in files]
            self.width = sum(numbers) // len(shards)
            self.parts = [np.memmap(file, np.float16, "r").reshape(-1, self.width) for file in files]
            self.ends = list(itertools.accumulate(map(len, self.parts)))
            if self.ends[-1] != len(shards):
                raise ValueError("not one of each text")
        except (OSError, ValueError, IndexError, ZeroDivisionError) as error:
            raise UserError(f"{folder}: the teacher's vectors of its texts are gone or damaged ({error}); delete the folder and run again: they are asked for anew") from None

    def of(self, records):
        """float32 [n, width]; records: int64 [n]."""
        places = [(bisect.bisect_right(self.ends, record), record) for record in records.tolist()]
        found = [self.parts[part][record - self.ends[part]] for part, record in places]  # from a part's end
        return np.array(found, np.float32).reshape(-1, self.width)
