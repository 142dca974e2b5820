"""Draw the house from its imports: the rooms and arrows of CONTRIBUTING.md.

    python scripts/rooms.py [--check]

A room is a folder, or a file at the door of a package. Writes the drawing and the table between the marks in
CONTRIBUTING.md; with
--check it writes nothing. Ends with 1 for an import that leads upwards, a circle of files, a room that FLOORS does not
  have, or (--check) a page that differs from the imports.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- rooms: made by scripts/rooms.py -->", "<!-- end of rooms -->"
PACKAGES = {"conan_engine": "conan_engine", "conan_kernels": "kernels"}  # name: folder

# From the top down: a room imports from the floors below its own alone. The files at the door are named; the rest are
# folders.
FLOORS = [
    ["train", "mine", "encode", "evaluate", "search", "translate", "prepare", "follow", "mteb_adapter"],
    ["stages", "export", "translation", "report"],
    ["evaluation"],
    ["run"],
    ["plan"],
    ["settings", "negatives"],
    ["model", "vectors"],
    ["data", "command"],
    ["data/sources", "parallel", "csrc"],
    ["languages", "atomic", "config", "kernels", "csrc/batches", "csrc/unpack"],
    ["kernels/attention", "kernels/info_nce", "kernels/pointwise", "csrc/shards"],
    ["kernels/attention/hopper"],
    ["kernels/architecture", "kernels/products", "errors"],
]
COMMANDS = FLOORS[0][1:]  # one box in the drawing: none imports another


def modules():
    """{dotted name: path} of both packages."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports():
    """{file: the files that it imports or includes}, as paths from the top of the repository."""
    known, found = modules(), {}
    for path in known.values():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in known else node.module for name in whole}
                names |= (
                    {"csrc"}
                    if f"{node.module}._loader" == "conan_engine._loader" and "conan_engine._loader" in whole
                    else set()
                )
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        found[path] = {
            known[name] for name in names if name in known and known[name] != ROOT / "conan_engine/__init__.py"
        }
        if "csrc" in names:
            found[path].add(ROOT / "csrc/bindings.cpp")
    sources = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in (".h", ".cpp", ".cu")]
    for path in sources:
        included = re.findall(r'^#include "(.+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
        found[path] = {ROOT / "csrc" / name for name in included} - {path}
    del found[ROOT / "conan_engine/__init__.py"]
    return {_short(path): sorted(map(_short, others)) for path, others in found.items()}


def _short(path):
    return path.relative_to(ROOT).as_posix()


def room(file):
    """The room of a file, as FLOORS names it."""
    if file.startswith("kernels/") and file.count("/") == 1:
        return "kernels" if file == "kernels/__init__.py" else file.removesuffix(".py")
    folder, _, name = file.removeprefix("conan_engine/").rpartition("/")
    return folder or name.removesuffix(".py")


def circle(graph):
    """Files that import each other in a loop, as a list that ends where it begins; None without one."""
    done, path = set(), []

    def visit(file):
        if file in path:
            return [*path[path.index(file) :], file]
        if file in done:
            return None
        path.append(file)
        found = next(filter(None, map(visit, graph.get(file, ()))), None)
        path.pop()
        done.add(file)
        return found

    return next(filter(None, map(visit, graph)), None)


def mistakes(graph):
    """A line for each rule of the house that an import breaks."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    for file, others in graph.items():
        here = room(file)
        if here not in floor:
            yield f"{file}: its room {here!r} is on no floor; give it one in FLOORS"
            continue
        for other in others:
            there = room(other)
            if there != here and there in floor and floor[there] <= floor[here]:
                yield f"{file} imports {other}, which leads upwards: {there} stands no lower than {here}"
    if loop := circle(graph):
        yield f"a circle: {' -> '.join(loop)}"


def arrows(graph):
    """{room: the rooms that it imports from}."""
    found = {}
    for file, others in graph.items():
        found.setdefault(room(file), set()).update(room(other) for other in others)
    return {here: there - {here} for here, there in found.items()}


def drawing(graph):
    """The rooms as a Mermaid flowchart. An arrow that follows from others is left out; the table has all."""
    boxes = {}
    for here, there in arrows(graph).items():
        boxes.setdefault("commands" if here in COMMANDS else here, set()).update(there)

    def below(name, seen):
        for other in boxes.get(name, ()):
            if other not in seen:
                seen.add(other)
                below(other, seen)
        return seen

    ids = {name: f"room_{re.sub(r'[^a-z]', '_', name)}" for name in boxes}
    lines = ["```mermaid", "flowchart TD"]
    for package in ("conan_engine", "kernels", "csrc"):
        lines.append(f"    subgraph {package}")
        for name in boxes:
            if (name.split("/")[0] if name.split("/")[0] in ("kernels", "csrc") else "conan_engine") == package:
                lines.append(f'        {ids[name]}["{name}{"/" * _is_folder(name)}"]')
        lines.append("    end")
    for name, others in boxes.items():
        for other in sorted(others):
            if not any(other in below(between, set()) for between in others - {other}):
                lines.append(f"    {ids[name]} --> {ids[other]}")
    return [*lines, "```"]


def _is_folder(name):
    return any((ROOT / base / name).is_dir() for base in ("conan_engine", ""))


def about(name):
    """The first sentence that a room says of itself."""
    for path in (
        ROOT / f"conan_engine/{name}.py",
        ROOT / f"conan_engine/{name}/__init__.py",
        ROOT / f"{name}.py",
        ROOT / f"{name}/__init__.py",
    ):
        if path.exists():
            said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).split("\n\n")[0].replace("\n", " ")
            return re.split(r"(?<=\.) |: `", said)[0].rstrip(".").replace("|", "\\|") + "."
    return CSRC[name]


CSRC = {
    "csrc": "What Python sees of the C++ part.",
    "csrc/batches": "Which records a step holds, and its batch read ahead by threads.",
    "csrc/shards": "A shard file: its format, written and read, every byte checked.",
    "csrc/unpack": "Token ids of 2 or 3 bytes widened on the GPU.",
}


def table(graph):
    """All rooms and all arrows, from the top down."""
    to = arrows(graph)
    lines = ["| room | what it is | imports from |", "|---|---|---|"]
    for names in FLOORS:
        for name in names:
            lines.append(
                f"| `{name}{'/' if _is_folder(name) else ''}` | {about(name)} | "
                f"{', '.join(sorted(to[name])) or 'nothing'} |"
            )
    return lines


def main():
    graph = imports()
    wrong = list(mistakes(graph))
    made = "\n".join([BEGIN, "", *drawing(graph), "", *table(graph), "", END])
    page = PAGE.read_text(encoding="utf-8")
    new = re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: made, page, flags=re.DOTALL)
    if "--check" not in sys.argv:
        PAGE.write_text(new, encoding="utf-8")
    elif new != page:
        wrong.append(f"{PAGE.name}: its drawing is not that of the imports; python scripts/rooms.py makes it")
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
