"""The documentation of installed packages, read and never run: first paragraph, the rest, and the code."""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import NamedTuple

from conan_engine.data.sources import places
from conan_engine.data.sources.processes import Pool

CODE_LINES = 12  # more lines than a training step reads
# names that the compiler gives a class
GIVEN = {"__name__", "__module__", "__qualname__", "__type_params__", ".type_params", "__firstlineno__"}
SKIPPED_FOLDERS = {"tests", "test", "idlelib", "lib2to3", "site-packages", "__pycache__"}


class Docstring(NamedTuple):
    package: str
    module: str  # numpy.linalg
    name: str  # numpy.linalg.norm
    path: str
    line: int
    summary: str  # the first paragraph, on one line
    rest: str  # "" if there is none
    code: str = ""  # for a function: its name and parameters, then its first statements


def read(packages: Iterable[str]) -> Iterator[Docstring]:
    """Yield the Docstrings of packages, each (summary, rest) once.

    packages: "stdlib", or a top-level name in site-packages or beside it (places). A file that Python cannot parse is
    left out. Raises UserError for a package that is not installed.
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
        for name, line, text, code in _documented(path, module):
            summary, _, rest = inspect.cleandoc(text).strip().partition("\n\n")
            summary = " ".join(summary.split())
            if summary:
                found.append(Docstring(package, module, name, str(path), line, summary, rest.strip(), code))
    return found


def modules(package: str) -> Iterator[tuple[Path, str]]:
    """(file, dotted name) of every module of a package, sorted. Raises UserError if it is not installed."""
    start = Path(sysconfig.get_path("stdlib")) if package == "stdlib" else places.find(package, package)
    root = start if package == "stdlib" else start.parent
    for path in sorted(start.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED_FOLDERS.intersection(parts):
            yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _documented(path, module):
    """(dotted name, line, docstring, code) of a module, its classes and functions.

    Included is what numpy and torch document from outside, by add_newdoc(module, name, text) and add_docstr(torch.name,
    text).
    """
    # loaded as `import` would, but not run: from the bytecode that pip has compiled, 10 times faster than from the
    # source
    loader = SourceFileLoader(module, str(path))
    try:
        with warnings.catch_warnings(action="ignore"):  # warnings about other people's code
            code, source = loader.get_code(module), loader.get_source(module)
    except (SyntaxError, ValueError, EOFError, ImportError):
        # ImportError: another encoding than the file says
        return  # packages ship templates and deliberate errors
    yield from _of_code(code, module, source.split("\n"))
    if {"add_newdoc", "add_docstr"}.intersection(code.co_names):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call):
                yield from _added(node, module)


def _of_code(code, name, lines):
    text = _docstring(code)
    if text is not None:
        yield name, code.co_firstlineno, text, _statements(code, lines)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):  # "<generic parameters of f>" encloses f
            yield from _of_code(inner, name if inner.co_name.startswith("<") else f"{name}.{inner.co_name}", lines)


def _statements(code, lines):
    """For a function, "def name(parameters):" and up to CODE_LINES lines after its docstring."""
    first = min((line for _, _, line in code.co_lines() if line and line > code.co_firstlineno), default=None)
    if first is None or not code.co_flags & inspect.CO_OPTIMIZED:
        return ""
    margin = _margin(lines[code.co_firstlineno - 1])
    inside = itertools.takewhile(
        lambda line: not line.strip() or _margin(line) > margin, lines[first - 1 : first - 1 + CODE_LINES]
    )
    body = "\n".join(line[margin:] for line in inside)
    parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return f"def {code.co_name}({', '.join(parameters)}):\n{body.rstrip()}"


def _margin(line):
    return len(line) - len(line.lstrip())


def _docstring(code):
    """The docstring of a code object, or None.

    It is the first constant of a function (from Python 3.14 only if a flag says so) and of a module. Of a class it is
    the first after its name and, from Python 3.13, its line number. Modules and classes store it as __doc__: it is a
    literal if that is the first name of their own.
    """
    if code.co_flags & inspect.CO_OPTIMIZED:  # "<lambda>" and "<listcomp>" are not functions here
        flagged = not code.co_name.startswith("<") and (
            sys.version_info < (3, 14) or code.co_flags & inspect.CO_HAS_DOCSTRING
        )
        return code.co_consts[0] if flagged and code.co_consts else None
    own = [name for name in code.co_names if name not in GIVEN]
    of_class = "__qualname__" in code.co_names[:3]
    if own[:1] == ["__doc__"]:
        return next((value for value in code.co_consts[of_class : 1 + 2 * of_class] if isinstance(value, str)), None)


def _added(call, name):
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    strings = [
        node
        for argument in call.args
        for node in ast.walk(argument)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    if called == "add_newdoc" and len(strings) >= 3:
        yield ".".join(s.value for s in strings[:-1]), strings[-1].lineno, strings[-1].value, ""
    elif called == "add_docstr" and strings and isinstance(call.args[0], ast.Attribute):
        text = max(strings, key=lambda s: len(s.value))
        yield ast.unparse(call.args[0]), text.lineno, text.value, ""
