"""Folders that declare which of their files are which: saved by `datasets`, or repositories of the Hub."""

from __future__ import annotations

import glob
import json
import re
from pathlib import Path

from conan_engine.errors import UserError

HEAD = re.compile(r"---\s*\n(.*?)\n---\s*\n", re.DOTALL)  # the YAML at the head of a README.md
SPLIT = "train"


def files(folder: Path) -> list[Path]:
    """The files of the split "train", sorted; an empty list if the folder declares nothing. Raises UserError if it
    has no such split.
    """
    if (folder / "state.json").exists():  # a Dataset saved by save_to_disk
        listed = _json(folder / "state.json").get("_data_files")
        return sorted(folder / file["filename"] for file in listed) if listed else []
    if (folder / "dataset_dict.json").exists():  # a DatasetDict saved by save_to_disk
        return files(folder / _chosen(folder, _json(folder / "dataset_dict.json").get("splits", [])))
    return _declared(folder)


def _json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); save the dataset again, or name its .arrow files") from None


def _chosen(folder, splits):
    if SPLIT not in splits:
        raise UserError(f"{folder}: holds the splits {', '.join(splits)} and no {SPLIT!r}; name the files of one")
    return SPLIT


def _declared(folder):
    """The files that the `configs` at the head of a README.md declare, as on the Hub."""
    readme = folder / "README.md"
    head = HEAD.match(readme.read_text(encoding="utf-8", errors="replace")) if readme.exists() else None
    if not head:
        return []
    import yaml

    try:
        about = yaml.safe_load(head[1])
    except yaml.YAMLError:
        return []  # this README.md is not a dataset's
    configs = about.get("configs") if isinstance(about, dict) else None
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs):
        return []
    default = [
        config
        for config in configs
        if len(configs) == 1 or config.get("default") or config.get("config_name") == "default"
    ]
    if not default:
        raise UserError(
            f"{folder}: its README.md declares the configs "
            f"{', '.join(str(config.get('config_name')) for config in configs)}; name the files of one, such as "
            f"{folder}/FOLDER/*.parquet"
        )
    by_split = default[0].get("data_files")
    if isinstance(by_split, list) and all(
        isinstance(one, dict) and {"split", "path"} <= one.keys() for one in by_split
    ):
        by_split = {one["split"]: one["path"] for one in by_split}
        by_split = by_split[_chosen(readme, by_split)]
    patterns = [by_split] if isinstance(by_split, str) else filter(lambda one: isinstance(one, str), by_split or [])
    return sorted(
        {
            Path(path)
            for pattern in patterns
            for path in glob.glob(f"{glob.escape(str(folder))}/{pattern}", recursive=True)
        }
    )
