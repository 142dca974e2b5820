"""Compare the settings and data of a run with those of its checkpoint, and decide whether it may continue."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conan_engine.config import TABLES, Source
from conan_engine.errors import UserError
from conan_engine.settings import from_dict

if TYPE_CHECKING:
    from conan_engine.config import Config


# Settings that decide a stage's batches and pools: they cannot change while the stage is under way.
FIXED = (
    "data",
    "sts",
    "size_power",
    "batch",
    "batch_tokens",
    "sts_batch",
    "texts",
    "texts_batch",
    "max_tokens",
    "teacher",
    "min_score",
    "distil",
    "distil_teacher",
)
FIXED_POOLS = ("supervised.steps", "negatives.count", "negatives.pool")


def standing(found: tuple[Path, dict[str, Any]] | None, config: Config) -> tuple[str, int, list[str]]:
    """(stage of the checkpoint `found`, its finished steps, stages still to train, including that one if it is not
    finished).
    """
    stage, step = (found[1]["stage"], found[1]["step"]) if found else (config.stages[0], 0)
    rest = config.stages[config.stages.index(stage) :]
    return stage, step, rest[step >= getattr(config, stage).steps :]


def differences(folder: str | Path, state: dict[str, Any], config: Config, under_way: str | None) -> str:
    """The settings that differ from those of the checkpoint `state` in `folder`, as words: "weak.lr = 0.5, was
    0.0001".

    under_way: the stage that continues from within, or None. Raises UserError for settings that cannot change within
    it.
    """
    was, now = (
        dict(leaves(dataclasses.asdict(c))) for c in (from_dict(state["config"], f"{folder}/state.json"), config)
    )
    found = [(key, was.get(key), now.get(key)) for key in {**was, **now} if was.get(key) != now.get(key)]
    adapters = [
        f"{key} was {_said(before)} and is {_said(after)} now"
        for key, before, after in found
        if key.startswith("lora.")
    ]
    if adapters:
        raise UserError(
            f"{folder}: {'; '.join(adapters)}: adapters cannot change; set it back, or choose another "
            f"out_dir with init_from = {config.out_dir}, which merges them"
        )
    fixed = [("seed",), *((under_way, key) for key in FIXED)] if under_way else []
    fixed += [tuple(key.split(".")) for key in FIXED_POOLS] if under_way == "supervised" else []
    refused = [
        f"{key} was {_said(before)} and is {_said(after)} now"
        for key, before, after in found
        if any(tuple(key.split(".", 2)[: len(f)]) == f for f in fixed)
    ]
    if refused:
        raise UserError(
            f"{folder}: {'; '.join(refused)}: that cannot change while {under_way} is under way; set it back, "
            "or choose another out_dir"
        )
    return ", ".join(f"{key} = {_said(after)}, was {_said(before)}" for key, before, after in found)


def check_data(
    folder: str | Path, state: dict[str, Any], fingerprints: dict[str, dict[str, str]], under_way: str
) -> None:
    """Raise UserError if the stage that continues from within had other records when `folder` was saved.

    fingerprints: {use: {source: fingerprint of its shards}}; the same settings may name a file that has changed.
    """
    for use in (under_way, *{"weak": ("texts",), "supervised": ("sts",)}.get(under_way, ())):
        for source, before in state.get("data", {}).get(use, {}).items():
            if fingerprints[use][source] != before:
                raise UserError(
                    f"{folder}: {source} has other records than before: that cannot change while "
                    f"{under_way} is under way; "
                    "put the old ones back, or choose another out_dir"
                )


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each setting. The value of a source is its weight, or its table."""
    for key, value in tree.items():
        if isinstance(value, dict) and prefix and key in TABLES:
            for source, about in value.items():
                own = {k: v for k, v in about.items() if v != getattr(Source(), k) or k == "weight"}
                yield f"{prefix}{key}.{source}", own if len(own) > 1 else about["weight"]
        elif isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _said(value):
    return "absent" if value is None else repr(value)
