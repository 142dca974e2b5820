"""The documentation of installed packages, read with `ast` and never imported: first paragraph -> the rest.

Pairs found: standard library 3.11 3,114, numpy 2.4 1,485, torch 2.13 7,091, matplotlib 1,954, django 753, sphinx 432,
wagtail 404, scipy 3,065, scikit-learn 2,366, pandas 2,718; held out: networkx 3.6 1,429, sympy 1.14 6,252.
"""

import ast
import inspect
import sysconfig
from pathlib import Path
from typing import NamedTuple

from conan_engine.data.processes import Pool
from conan_engine.errors import UserError

SKIPPED_FOLDERS = {"tests", "test", "idlelib", "lib2to3", "site-packages", "__pycache__"}


class Docstring(NamedTuple):
    package: str
    module: str  # numpy.linalg
    name: str  # numpy.linalg.norm
    path: str
    line: int
    summary: str  # the first paragraph, on one line
    rest: str


def read(packages):
    """Yield the Docstrings of packages ("stdlib", or a top-level name in site-packages), each (summary, rest) once.

    A docstring of one paragraph has no pair in it and is left out, as is a file that Python cannot parse. Raises
    UserError for a package that is not installed.
    """
    files = [(package, path, module) for package in packages for path, module in modules(package)]
    seen = set()
    with Pool() as pool:
        for found in pool.map(_read_files, (files[i : i + 64] for i in range(0, len(files), 64))):
            for doc in found:
                if (doc.summary, doc.rest) not in seen:
                    seen.add((doc.summary, doc.rest))
                    yield doc


def _read_files(files):
    found = []
    for package, path, module in files:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # templates and deliberate errors that packages ship
        for name, line, text in _documented(tree, module):
            summary, _, rest = inspect.cleandoc(text).strip().partition("\n\n")
            summary, rest = " ".join(summary.split()), rest.strip()
            if summary and rest:
                found.append(Docstring(package, module, name, str(path), line, summary, rest))
    return found


def modules(package):
    """(file, dotted name) of every module of a package, in sorted order. Raises UserError where it is not installed."""
    root = Path(sysconfig.get_path("stdlib" if package == "stdlib" else "purelib"))
    start = root if package == "stdlib" else root / package
    if not start.is_dir():
        raise UserError(f"{package}: not installed here (no folder {start}); pip install {package}, or name another source")
    for path in sorted(start.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED_FOLDERS.intersection(parts):
            yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _documented(node, name):
    """(dotted name, line, docstring) of a module, its classes and functions; and of what numpy and torch document from
    outside by add_newdoc(module, name, text) and add_docstr(torch.name, text)."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield name, node.body[0].lineno, text
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _documented(child, f"{name}.{child.name}")
            elif isinstance(child, (ast.If, ast.Try)):  # definitions that depend on the platform
                yield from _documented(ast.Module(child.body, []), name)
            elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
                yield from _added(child.value, name)


def _added(call, name):
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    strings = [node for argument in call.args for node in ast.walk(argument) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    if called == "add_newdoc" and len(strings) >= 3:
        yield ".".join(s.value for s in strings[:-1]), strings[-1].lineno, strings[-1].value
    elif called == "add_docstr" and strings and isinstance(call.args[0], ast.Attribute):
        text = max(strings, key=lambda s: len(s.value))
        yield ast.unparse(call.args[0]), text.lineno, text.value
