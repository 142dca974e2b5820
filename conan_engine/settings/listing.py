"""List every setting by section, with its default, type, range and meaning, as config.py declares it."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from conan_engine.config import STAGES, Config, Source, Stage


@dataclass(frozen=True)
class Setting:
    """One setting. `key` is what the command line takes; STAGE in it stands for each of the four stages."""

    key: str
    kind: str  # the type, with the interval of a number: "whole number in [1, 1000]"
    default: str  # as one types it; if stages differ: "0.0001 (sft: 2e-05)"
    meaning: str


@dataclass(frozen=True)
class Section:
    """The settings of one table of a config file, and what they are about."""

    name: str  # "weak"; empty for the keys above all tables
    about: str
    settings: list[Setting]


def sections() -> list[Section]:
    """All settings, section by section. What the four stages share is listed once, in the section STAGE."""
    config = Config()
    found = [Section("", _about(Config), _settings_of(config, ""))]
    for name, node in vars(config).items():
        if name == STAGES[0]:
            found.append(Section("STAGE", _about(Stage), _shared_by_stages(config)))
        if name in STAGES:
            own = [one for one in _settings_of(node, f"{name}.") if one.key.split(".")[1] not in vars(Stage())]
            if own:
                found.append(Section(name, _about(type(node)), own))
        elif dataclasses.is_dataclass(node):
            found.append(Section(name, _about(type(node)), _settings_of(node, f"{name}.")))
            for inner, value in vars(node).items():
                if dataclasses.is_dataclass(value):
                    name_of_both = f"{name}.{inner}"
                    found.append(Section(name_of_both, _about(type(value)), _settings_of(value, f"{name_of_both}.")))
    return found


def source_settings() -> Section:
    """What a stage's table of data can say about one source."""
    return Section("SOURCE", _about(Source), _settings_of(Source(), ""))


def _shared_by_stages(config: Config) -> list[Setting]:
    by_stage = {name: {one.key: one for one in _settings_of(getattr(config, name), "")} for name in STAGES}
    shared = []
    for one in _settings_of(Stage(), ""):
        differing = {name: by_stage[name][one.key].default for name in STAGES}
        others = ", ".join(f"{name}: {value}" for name, value in differing.items() if value != one.default)
        default = f"{one.default} ({others})" if others else one.default
        shared.append(dataclasses.replace(one, key=f"STAGE.{one.key}", default=default))
    return shared


def _settings_of(node: Any, prefix: str) -> list[Setting]:
    comments = _comments(type(node))
    return [
        Setting(f"{prefix}{key}", _kind(type(node), key, value), _typed(value), comments.get(key, ""))
        for key, value in vars(node).items()
        if not dataclasses.is_dataclass(value)
    ]


def _comments(kind: type) -> dict[str, str]:
    """The comment above or beside each setting of a class in config.py."""
    # base classes come first, so that a subclass overrides their comments
    lines = "".join(inspect.getsource(of) for of in kind.__mro__[-2::-1])
    return {
        key: " ".join(re.findall(r"# (.*)", above + beside))
        for above, key, beside in re.findall(r"((?:^    # .*\n)*)^    (\w+): .*?(  # .*)?$", lines, re.MULTILINE)
        if above or beside
    }


def _about(kind: type) -> str:
    return " ".join(inspect.getdoc(kind).split())


def _kind(owner: type, key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        number = "whole number" if isinstance(value, int) else "number"
        return f"{number} in {range_of(owner, key)}" if range_of(owner, key) else number
    return {str: "text", list: "list", dict: "table"}[type(value)]


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def range_of(kind: type, key: str) -> str | None:
    """The interval of a number, from the class that declares it first; None for any other setting."""
    declared = (
        base.__dict__["__dataclass_fields__"].get(key)
        for base in kind.__mro__
        if "__dataclass_fields__" in base.__dict__
    )
    return next((of.metadata["range"] for of in declared if of and "range" in of.metadata), None)


def ranges(node: Any, prefix: str = "") -> Iterator[tuple[str, float, str]]:
    """(dotted key, value, interval) of each number that has an interval."""
    for key, value in vars(node).items():
        if dataclasses.is_dataclass(value):
            yield from ranges(value, f"{prefix}{key}.")
        elif interval := range_of(type(node), key):
            yield f"{prefix}{key}", value, interval


def as_help() -> Iterator[str]:
    """The lines of --help, at most 80 columns wide."""
    for section in sections():
        yield ""
        about = f"[{section.name}] {section.about}" if section.name else section.about
        yield from textwrap.wrap(about, 80, break_long_words=False, break_on_hyphens=False)
        for one in section.settings:
            yield f"  --{one.key}={one.default}"
            meaning = f"{one.meaning} ({one.kind})" if one.meaning else one.kind
            yield from textwrap.wrap(
                meaning, 80, initial_indent=" " * 6, subsequent_indent=" " * 6, break_long_words=False,
                break_on_hyphens=False,
            )  # fmt: skip
