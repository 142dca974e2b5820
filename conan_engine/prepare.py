"""Write the tokenizer and the token shards of a run ahead of time.

CONFIG and settings are those of train.py; the shards go into its out_dir.
Sources are cut into units by the names and sizes of their files, so any number
of processes and machines writes the same shards. Stopped or killed, the same
command continues behind the units that are finished. K machines that share
out_dir each do one part (--part 1/K to K/K), in any order; the last one to end
joins the parts.

Examples:
    python -m conan_engine.prepare configs/demo.toml
    python -m conan_engine.prepare run.toml --part 3/16 --out_dir=/shared/run
"""

from __future__ import annotations

import functools
import json
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
    parser = command.Parser("prepare", __doc__)
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a TOML file, or one that comes with the engine; --KEY=VALUE overrides a setting",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes on this machine (default: tokenizer.processes; 0 is one per core)",
    )
    parser.add_argument("--part", default="1/1", metavar="I/K", help="do part I of K")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help='run the units as tasks of this Ray cluster ("auto": the one of this machine); its nodes must see out_dir '
        "and the sources",
    )
    arguments, settings = parser.parse_known_args()
    part = command.part(arguments.part)
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers: got {arguments.workers}; expected 1 or more")
    config = load(arguments.config, settings)
    elsewhere = functools.partial(on_ray.unordered, arguments.ray) if arguments.ray else None
    datasets.prepare(config, arguments.workers, part, elsewhere)
    print(summary(config))


def summary(config: Config) -> str:
    """The sources, their records and their tokens, as a table."""
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
    return "\n".join(lines + ["the other parts are not finished; the last one to end joins them"] * unfinished)


if __name__ == "__main__":
    command.run(main)
