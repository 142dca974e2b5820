"""Read a config: a TOML file and `--section.key=value` arguments become a Config."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import conan_engine
from conan_engine.config import STAGES, TABLES, Config, Source
from conan_engine.data.sources.forms import COLUMNS, LISTS, kind_of
from conan_engine.errors import UserError
from conan_engine.model import pretrained
from conan_engine.settings import rules

# those that come with the engine: within an installed package, at the top of a checkout
_PACKAGE = Path(conan_engine.__file__).parent
CONFIGS = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.exists())


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read `path` (TOML) over the defaults, then each `--section.key=value` of `overrides`. [model] is that of
    init_from.

    Args:
        path: a TOML file, or the name of a config that comes with the engine, such as "demo".
        overrides: settings as one types them, "--section.key=value".

    Returns:
        The checked Config.

    Raises:
        UserError: for a missing or broken file, an unknown key (with the nearest known one), and a value of the wrong
            type or out of range.
    """
    config, path = Config(), _found(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: cannot read this config: {error}") from None
    where, given = str(path), set(_named(tree))
    _assign(config, tree, "", where)
    for text in overrides:
        one = _of_source(text)
        keys, tree = one or _of_setting(text)
        for section in reversed(keys):
            tree = {section: tree}
        _assign(config, tree, "", f"argument {text!r}", one is not None)
        given.update(_named(tree))
    rules.check_layers(config, where)
    if config.init_from:
        pretrained.adopt(config, given, where)
    rules.check(config, where)
    return config


def _found(path):
    """The path of a config's file. One of a name alone may be among CONFIGS."""
    path, ours = Path(path), {of.stem: of for of in CONFIGS.glob("*.toml")}
    if path.exists():
        return path
    if path.name == str(path) and path.name.removesuffix(".toml") in ours:
        return ours[path.name.removesuffix(".toml")]
    raise UserError(
        f"{path}: there is no such config; name a TOML file, or one that comes with the engine: "
        f"{', '.join(sorted(ours))}"
    )


def _named(tree, prefix=""):
    """The dotted keys of a tree, including those within its sections."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _named(value, f"{prefix}{key}.")


def _of_setting(argument):
    """Split --section.key=value into ([section, key], value)."""
    key, equals, value = argument.removeprefix("--").partition("=")
    if not argument.startswith("--") or not equals:
        raise UserError(f"argument {argument!r}: expected --section.key=value")
    parsed = _toml(value)
    return key.split("."), value if parsed is None else parsed  # a bare word counts as a string


def _of_source(argument):
    """Split --weak.data.PATH=WEIGHT, or ={ a table }, into (["weak", "data", PATH], value); None for other settings.

    PATH may contain dots and equals signs: it ends at the first equals sign that a weight or a table follows.
    """
    for section in (f"{part}.{key}" for part in (*STAGES, "validation") for key in TABLES):
        prefix = f"--{section}."
        if argument.startswith(prefix):
            parts = argument.removeprefix(prefix).split("=")
            for end in range(1, len(parts)):
                value = _toml("=".join(parts[end:]))
                if isinstance(value, int | float | dict):
                    return [*section.split("."), "=".join(parts[:end])], value
            raise UserError(f"argument {argument!r}: expected {prefix}SOURCE=WEIGHT, such as {prefix}my/file.jsonl=1")
    return None


def _toml(text):
    """Parse a value as TOML; None if it is not TOML."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return None


def from_dict(tree: dict[str, Any], where: str) -> Config:
    """The Config of a dict, such as the config.json of a run (`dataclasses.asdict`).

    Args:
        tree: the settings as nested dicts.
        where: named in errors, such as the path of the file.

    Raises:
        UserError: as `load` does.
    """
    config = Config()
    _assign(config, tree, "", where)
    rules.check(config, where)
    return config


def _assign(node, tree, prefix, where, one_source=False):
    """Set the keys of a tree on a config. one_source: a table in the tree adds to the sources that are there."""
    hints = typing.get_type_hints(type(node))
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in hints:
            near = difflib.get_close_matches(name, _all_keys(Config()), n=1, cutoff=0)
            raise UserError(f"{where}: unknown key {name!r}; the nearest is {near[0]!r}")
        hint, current = hints[key], getattr(node, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise UserError(
                    f"{where}: {name} is a section: set one of its keys, such as {name}.{next(iter(vars(current)))}"
                )
            _assign(current, value, f"{name}.", where, one_source)
        elif hint == dict[str, Source]:
            if not isinstance(value, dict):
                raise UserError(f"{where}: {name} is {value!r}; expected a table of source = weight")
            sources = {source: _source(about, f"{where}: {name}[{source!r}]") for source, about in value.items()}
            merged = {**(current if one_source else {}), **sources}
            setattr(node, key, {source: about for source, about in merged.items() if about.weight})
        else:
            if hint is float and type(value) is int:
                value = float(value)
            if hint == list[float] and isinstance(value, list):
                value = [float(v) if type(v) is int else v for v in value]
            forms = hint.__args__ if isinstance(hint, types.UnionType) else (hint,)
            if not any(_has_type(value, form) for form in forms):
                raise UserError(f"{where}: {name} is {value!r}; expected {' or '.join(map(_type_name, forms))}")
            setattr(node, key, value)


def _has_type(value, form):
    """Whether a value has a type. form: a type, or list[a type]."""
    if isinstance(form, types.GenericAlias):
        return isinstance(value, list) and all(type(v) is form.__args__[0] for v in value)
    return type(value) is form


def _type_name(form):
    return f"a list of {form.__args__[0].__name__}" if isinstance(form, types.GenericAlias) else form.__name__


def _source(about, where):
    """A Source from a weight or a table. Keys of the table that are no setting of a source name columns."""
    about = dict(about) if isinstance(about, dict) else {"weight": about}
    columns = dict(about.pop("columns", {}))  # the form of a saved run
    columns |= {key: about.pop(key) for key in list(about) if key in COLUMNS}
    weight = about.pop("weight", 1.0)
    if type(weight) not in (int, float) or not 0 <= weight < float("inf"):
        raise UserError(
            f"{where}: the weight is {weight!r}; expected a table of source = weight, weights above 0, or 0 to "
            "leave a source out"
        )
    source = Source(float(weight), columns)
    for key, value in about.items():
        if key not in ("in_batch_negatives", "hard_negatives", "distil"):
            near = difflib.get_close_matches(key, [*vars(source), *COLUMNS], n=1, cutoff=0)
            raise UserError(f"{where}: unknown key {key!r}; the nearest is {near[0]!r}")
        expected = type(getattr(source, key))
        if type(value) is not expected:
            raise UserError(f"{where}: {key} is {value!r}; expected {expected.__name__}")
        setattr(source, key, value)
    for key, column in columns.items():
        names = column if isinstance(column, list) and key in LISTS else [column]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise UserError(
                f"{where}: {key} is {column!r}; expected the name of a column of the file"
                + ", or a list of names" * (key in LISTS)
            )
    if columns and kind_of(columns) is None:
        raise UserError(
            f"{where}: the columns named, {', '.join(columns)}, make no record; name query and pos, sentence1, "
            "sentence2 and score, text and label, instruction and output, messages, or text"
        )
    return source


def _all_keys(node, prefix=""):
    for key, value in vars(node).items():
        yield f"{prefix}{key}"
        if dataclasses.is_dataclass(value):
            yield from _all_keys(value, f"{prefix}{key}.")
