"""The error lines that a user can meet, read from the code; docs/troubleshooting.md must have each.

    python scripts/error_lines.py [--check]

An expression within a line is shown as "…". --check prints what the page lacks or has in excess, and then ends with 1.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/troubleshooting.md"


def lines():
    """{error line: the file that raises it}"""
    found = {}
    for path in sorted((ROOT / "conan_engine").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _name(node.func) in ("UserError", "TooMany", "Bad") and node.args:
                for line in _said(node.args[-1]):
                    if line.strip("… "):
                        found[line] = str(path.relative_to(ROOT))
    return found


def _name(function):
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _said(node):
    """The lines that an expression can be."""
    if isinstance(node, ast.IfExp):
        return _said(node.body) + _said(node.orelse)
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
        return [re.sub("…+", "…", "".join(parts))]
    return []


def on_page():
    """The error lines of the page: the first column of its tables."""
    return re.findall(r"^\| ``? ?(.+?) ?``? \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def main():
    found = lines()
    if sys.argv[1:] != ["--check"]:
        for line, path in found.items():
            print(f"{path}: {line}")
        return
    page = on_page()
    wrong = [f"missing: {line} ({found[line]})" for line in found if line not in page]
    wrong += [f"in no file any more: {line}" for line in page if line not in found]
    if wrong:
        sys.exit("\n".join([f"{PAGE}:", *wrong]))


if __name__ == "__main__":
    main()
