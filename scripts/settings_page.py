"""docs/settings.md, made from conan_engine/config.py.

    python scripts/settings_page.py [--check]

--check changes nothing and ends with 1 where the page is not as it would be made.
"""

import re
import sys
from pathlib import Path

from conan_engine.settings.listing import sections, source_settings

PAGE = Path(__file__).resolve().parent.parent / "docs/settings.md"
HEAD = """# Settings

<!-- made by scripts/settings_page.py from conan_engine/config.py: change it there -->

A config is a TOML file. `--section.key=value` on the command line overrides it, and `train.py --help` lists the same
settings in a terminal. A default is the paper's where the paper gives one; "ours" marks our own choice. A wrong value
gets one line that names the key, the value and what was expected.

    torchrun conan_engine/train.py configs/demo.toml --weak.lr=5e-4 --supervised.dims="[64, 256, 512]"
"""
SOURCES = """
## A source in a table of data

`data`, `sts` and `texts` are tables of `source = weight`, or of `source = { weight = 1, ... }` with these keys. A
column is named like any other key: `query = "title"`. [Data formats](data.md) says what a source can be.
"""


def page():
    parts = [HEAD]
    for section in sections():
        if section.name == "STAGE":
            parts.append(f"\n## Every stage\n\n{section.about}\n")
        elif section.name:
            parts.append(f"\n## `[{section.name}]`\n\n{section.about}\n")
        else:
            parts.append(f"\n## Above all tables\n\n{section.about}\n")
        parts.append(table(section.settings))
    parts += [SOURCES, table(source_settings().settings)]
    return "".join(parts)


def table(settings):
    lines = ["\n| setting | default | type | meaning |", "|---|---|---|---|"]
    for one in settings:
        default = f"`{one.default}`" if one.default else "empty"
        kind = re.sub(r" in (.*)", r" in `\1`", one.kind)
        lines.append(f"| `{one.key}` | {default} | {kind} | {one.meaning} |")
    return "\n".join(lines) + "\n"


def main():
    made = page()
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text(encoding="utf-8") != made:
            sys.exit(f"{PAGE}: not as config.py has it; run python scripts/settings_page.py")
        return
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
