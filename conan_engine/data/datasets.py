"""The data of a config: its tokenizer, and the token shards of each source, for training and validation."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from conan_engine.data import build

if TYPE_CHECKING:
    from conan_engine.config import Config
    from conan_engine.data.job import Job
    from conan_engine.data.shards import Shards
    from conan_engine.data.tokenizer import AnyTokenizer


def prepare(
    config: Config, processes: int | None = None, part: tuple[int, int] = (1, 1), elsewhere: Callable | None = None
) -> tuple[AnyTokenizer, dict[tuple[str, str], Shards], dict[str, dict[str, Shards]]]:
    """Write the data of a config, if it is not there yet, and open it.

    Args:
        config: the config.
        processes, part, elsewhere: as build.make_shards takes them; None means config.tokenizer.processes.

    Returns:
        (tokenizer, training shards by (stage, source), validation shards as {stage: {source: Shards}}). "sts" stands
            for the scored pairs of the supervised stage, "texts" for the texts without pairs of the weak stage.
    """
    tokenizer, to_train, held_out = plan(config)
    shards = build.make_shards(
        jobs(to_train, held_out),
        tokenizer,
        config.tokenizer.processes if processes is None else processes,
        part,
        elsewhere,
    )

    def whole(planned):
        return {key: shards[job.folder] for key, job in planned.items() if job.folder in shards}

    return tokenizer, whole(to_train), {name: whole(planned) for name, planned in held_out.items()}


def plan(config: Config) -> tuple[AnyTokenizer, dict[tuple[str, str], Job], dict[str, dict[str, Job]]]:
    """The tokenizer, made if it is not there, and the Jobs: training by (use, source), validation by stage and
    source.
    """
    uses = [
        (source, name, getattr(config, name), about)
        for name in config.stages
        for source, about in getattr(config, name).data.items()
    ]
    for name, use in (("weak", "texts"), ("supervised", "sts")):
        if name in config.stages:
            uses += [
                (source, use, getattr(config, name), about)
                for source, about in getattr(getattr(config, name), use).items()
            ]
    sources = [(source, use, about) for source, use, _, about in uses]
    tokenizer = build.make_tokenizer(config.tokenizer, sources, config.out_dir, config.skip_bad_records)
    folder = Path(config.out_dir, "data")
    max_bad_share = config.max_bad_share if config.skip_bad_records else None
    to_train = {
        (use, source): build.make_job(source, use, stage, tokenizer, folder, max_bad_share)
        for source, use, stage, _ in uses
    }
    held_out = {}
    for source, about in config.validation.data.items():
        uses, kinds = build.fits(
            source, about, [*config.stages, *["sts"] * ("supervised" in config.stages)], config.skip_bad_records
        )
        if not uses:
            _say(
                f"validation.data: {source} holds {' or '.join(kinds)} records, which none of "
                f"{', '.join(config.stages)} takes: it is passed over"
            )
        for use in uses:
            name = "supervised" if use == "sts" else use
            stage = dataclasses.replace(getattr(config, name), **{"sts" if use == "sts" else "data": {source: about}})
            held_out.setdefault(name, {})[source] = build.make_job(source, use, stage, tokenizer, folder, max_bad_share)
    return tokenizer, to_train, held_out


@functools.cache  # the plan is asked for several times
def _say(line):
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def jobs(to_train: dict[tuple[str, str], Job], held_out: dict[str, dict[str, Job]]) -> list[Job]:
    return [*to_train.values(), *(job for of_stage in held_out.values() for job in of_stage.values())]
