"""Write what train.py trains on, ahead of time: `python -m conan_engine.prepare CONFIG [--workers N] [--part I/K] [--section.key=value ...]`.

The tokenizer, and the token shards of every source, under the config's out_dir. Sources are cut into units by the names and sizes of their
files alone, so that the same shards come out of any number of processes and machines. Stopped or killed, the same command goes on behind
the units that are finished. K machines that share out_dir each start with a part of their own, in any order, again where one failed; the
last of them makes the sources whole, or else train.py or this command without --part. --ray: the units as tasks of a Ray cluster.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
from pathlib import Path

from conan_engine import errors
from conan_engine.config import load
from conan_engine.data import build, on_ray, units
from conan_engine.data.rejects import by_reason
from conan_engine.data.shards import MANIFEST
from conan_engine.errors import UserError


def prepare_data(config, processes=None, part=(1, 1), elsewhere=None):
    """What a config trains on, written unless it stands there already.

    processes, part, elsewhere: as build.make_shards takes them; None: config.tokenizer.processes. Returns the tokenizer; the shards to
    train on by (stage, source), where "sts" stands for the supervised stage's scored pairs and
    "texts" for the weak stage's texts without pairs; and those held out, {stage: {source: Shards}}.
    """
    tokenizer, to_train, held_out = plan(config)
    shards = build.make_shards(_jobs(to_train, held_out), tokenizer, config.tokenizer.processes if processes is None else processes, part, elsewhere)

    def whole(planned):
        return {key: shards[job.folder] for key, job in planned.items() if job.folder in shards}

    return tokenizer, whole(to_train), {name: whole(planned) for name, planned in held_out.items()}


def plan(config):
    """The tokenizer, made unless it stands there, and the units.Jobs: to train on by (use, source), held out by stage and source."""
    uses = [(source, name, getattr(config, name), about) for name in config.stages for source, about in getattr(config, name).data.items()]
    for name, use in (("weak", "texts"), ("supervised", "sts")):
        if name in config.stages:
            uses += [(source, use, getattr(config, name), about) for source, about in getattr(getattr(config, name), use).items()]
    sources = [(source, use, about) for source, use, _, about in uses]
    tokenizer = build.make_tokenizer(config.tokenizer, sources, config.out_dir, config.skip_bad_records)
    folder = Path(config.out_dir, "data")
    max_bad_share = config.max_bad_share if config.skip_bad_records else None
    to_train = {(use, source): build.make_job(source, use, stage, tokenizer, folder, max_bad_share) for source, use, stage, _ in uses}
    held_out = {}
    for source, about in config.validation.data.items():
        uses, kinds = build.fits(source, about, [*config.stages, *["sts"] * ("supervised" in config.stages)], config.skip_bad_records)
        if not uses:
            _say(f"validation.data: {source} holds {' or '.join(kinds)} records, which none of {', '.join(config.stages)} takes: it is passed over")
        for use in uses:
            name = "supervised" if use == "sts" else use
            stage = dataclasses.replace(getattr(config, name), **{"sts" if use == "sts" else "data": {source: about}})
            held_out.setdefault(name, {})[source] = build.make_job(source, use, stage, tokenizer, folder, max_bad_share)
    return tokenizer, to_train, held_out


@functools.cache  # several ask for the plan
def _say(line):
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def _jobs(to_train, held_out):
    return [*to_train.values(), *(job for of_stage in held_out.values() for job in of_stage.values())]


def main():
    parser = argparse.ArgumentParser(prog="python -m conan_engine.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config file; --section.key=value changes a setting of it")
    parser.add_argument("--workers", type=int, metavar="N", help="processes on this machine (default: tokenizer.processes, by default one a core)")
    parser.add_argument("--part", default="1/1", metavar="I/K", help="do the I-th of K parts of the work")
    parser.add_argument("--ray", metavar="ADDRESS", help="of a Ray cluster (\"auto\": the one that this machine is in), which shares out_dir and the sources")
    arguments, settings = parser.parse_known_args()
    part = re.fullmatch(r"(\d+)/(\d+)", arguments.part)
    part = part and tuple(map(int, part.groups()))
    if not part or not 1 <= part[0] <= part[1]:
        raise UserError(f"--part: got {arguments.part!r}; expected I/K with I from 1 to K, such as 3/8")
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers: got {arguments.workers}; expected 1 or more")
    config = load(arguments.config, settings)
    elsewhere = functools.partial(on_ray.unordered, arguments.ray) if arguments.ray else None
    prepare_data(config, arguments.workers, part, elsewhere)
    print(summary(config))


def summary(config):
    """What there is of every source, as a table."""
    _, to_train, held_out = plan(config)
    jobs = {job.folder: job for job in _jobs(to_train, held_out)}
    rows, unfinished = [("source", "for", "records", "tokens", "left out")], False
    for job in jobs.values():
        if not job.finished():
            cut = job.units()
            rows.append((job.source, job.use, f"{sum(map(job.finished, range(len(cut))))} of {len(cut)} units", "", ""))
            unfinished = True
            continue
        manifest, report = (json.loads((job.folder / name).read_text(encoding="utf-8")) for name in (MANIFEST, units.REPORT))
        below = {said: report[key] for key, said in (("below_min_score", "below min_score"), ("too_long", "too long")) if report.get(key)}
        rows.append((job.source, job.use, f"{manifest['records']:,}", f"{manifest['tokens']:,}", by_reason({**report["left_out"], **below})))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join((row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2].rjust(widths[2]), row[3].rjust(widths[3]), row[4])).rstrip() for row in rows]
    return "\n".join(lines + ["the other parts are not done; the last one to end makes the sources whole"] * unfinished)


if __name__ == "__main__":
    errors.run(main)
