"""Write what train.py trains on, ahead of time:
`python -m conan_engine.prepare CONFIG [--workers N] [--part I/K] [--section.key=value ...]`.

The tokenizer, and the token shards of every source, under the config's out_dir. Sources are cut into units by the names
and sizes of their files alone, so that the same shards come out of any number of processes and machines. Stopped or
killed, the same command goes on behind the units that are finished. K machines that share out_dir each start with a
part of their own, in any order, again where one failed; the last of them makes the sources whole, or else train.py or
this command without --part. --ray: the units as tasks of a Ray cluster.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from typing import TYPE_CHECKING

from conan_engine import command
from conan_engine.data import datasets, on_ray, units
from conan_engine.data.rejects import by_reason
from conan_engine.data.shards import MANIFEST
from conan_engine.errors import UserError
from conan_engine.settings import load

if TYPE_CHECKING:
    from conan_engine.config import Config


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m conan_engine.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a config file; --section.key=value changes a setting of it")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes on this machine (default: tokenizer.processes, by default one a core)",
    )
    parser.add_argument("--part", default="1/1", metavar="I/K", help="do the I-th of K parts of the work")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help='of a Ray cluster ("auto": the one that this machine is in), which shares out_dir and the sources',
    )
    arguments, settings = parser.parse_known_args()
    said = re.fullmatch(r"(\d+)/(\d+)", arguments.part)
    part = (int(said[1]), int(said[2])) if said else (0, 0)
    if not 1 <= part[0] <= part[1]:
        raise UserError(f"--part: got {arguments.part!r}; expected I/K with I from 1 to K, such as 3/8")
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers: got {arguments.workers}; expected 1 or more")
    config = load(arguments.config, settings)
    elsewhere = functools.partial(on_ray.unordered, arguments.ray) if arguments.ray else None
    datasets.prepare(config, arguments.workers, part, elsewhere)
    print(summary(config))


def summary(config: Config) -> str:
    """What there is of every source, as a table."""
    _, to_train, held_out = datasets.plan(config)
    jobs = {job.folder: job for job in datasets.jobs(to_train, held_out)}
    rows, unfinished = [("source", "for", "records", "tokens", "left out")], False
    for job in jobs.values():
        if not job.finished():
            cut = job.units()
            rows.append((job.source, job.use, f"{sum(map(job.finished, range(len(cut))))} of {len(cut)} units", "", ""))
            unfinished = True
            continue
        manifest, report = (
            json.loads((job.folder / name).read_text(encoding="utf-8")) for name in (MANIFEST, units.REPORT)
        )
        below = {
            said: report[key]
            for key, said in (("below_min_score", "below min_score"), ("too_long", "too long"))
            if report.get(key)
        }
        rows.append(
            (
                job.source,
                job.use,
                f"{manifest['records']:,}",
                f"{manifest['tokens']:,}",
                by_reason({**report["left_out"], **below}),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join(
            (row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2].rjust(widths[2]), row[3].rjust(widths[3]), row[4])
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines + ["the other parts are not done; the last one to end makes the sources whole"] * unfinished)


if __name__ == "__main__":
    command.run(main)
