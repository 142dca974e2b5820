"""Where text comes from: installed documentation, catalogues, and a person's own files with every mistake in them."""

import ast
import gzip
import json
import py_compile
import sysconfig
from pathlib import Path

import pytest
from runs import ROOT

from conan_engine.data.sources import catalogues, docstrings, files, installed, places
from conan_engine.errors import UserError


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """An empty site-packages."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_docstrings_are_split_into_first_paragraph_and_rest(packages):
    write(packages / "zoo/__init__.py", '"""The zoo.\n\nIt has animals."""\n')
    write(
        packages / "zoo/cage.py",
        'class Lion:\n    """One\n    paragraph."""\n    def roar(self):\n        """Make a\n        noise.\n\n '
        '       Loud:\n            very\n        """\n',
    )
    write(packages / "zoo/tests/test_cage.py", '"""Not\n\ndocumentation."""')
    write(packages / "zoo/template.py", "def {{ broken }}")
    found = list(docstrings.read(["zoo"]))
    assert [(d.module, d.name, d.line, d.summary, d.rest) for d in found] == [
        ("zoo", "zoo", 1, "The zoo.", "It has animals."),
        ("zoo.cage", "zoo.cage.Lion", 1, "One paragraph.", ""),
        ("zoo.cage", "zoo.cage.Lion.roar", 4, "Make a noise.", "Loud:\n    very"),
    ]


CAGE = '''
import functools

@functools.cache
def feed(animal, *, meat="beef"):
    """Feed it."""
    if not animal:

        raise ValueError(animal)
    return [meal(m) for m in meat]

class Lion:
    __doc__ = feed.__doc__
    name = "Leo"
    @property
    async def mane(self):
        """Hair.

        Only some.
        """

        def comb():
            """Comb it."""
            return self

        return comb  # often
    def short(self): "Too short."; return 1
after = 1
'''


def test_code_is_what_stands_behind_the_docstring(packages):
    write(packages / "zoo/__init__.py", CAGE)
    found = {d.name: d.code for d in docstrings.read(["zoo"])}
    assert found == {
        "zoo.feed": "def feed(animal, meat):\n    if not animal:\n\n        raise ValueError(animal)\n    return "
        "[meal(m) for m in meat]",
        "zoo.Lion.mane": 'def mane(self):\n    def comb():\n        """Comb it."""\n'
        "        return self\n\n    return comb  # often",
        "zoo.Lion.mane.comb": "def comb():\n    return self",
        "zoo.Lion.short": "",
    }


def test_bytecode_says_what_the_source_says(packages):
    path = write(packages / "zoo/__init__.py", CAGE)
    compiled = list(docstrings.read(["zoo"]))
    bytecode = Path(py_compile.compile(path))
    assert list(docstrings.read(["zoo"])) == compiled
    read_from = bytecode.read_bytes().replace(b"Feed it.", b"Food it.")
    bytecode.write_bytes(read_from)
    assert next(docstrings.read(["zoo"])).summary == "Food it.", "the bytecode that is there is not used"
    write(path, CAGE.replace("Feed it.", "Feed all of it."))
    assert next(docstrings.read(["zoo"])).summary == "Feed all of it.", "bytecode of what the source was"


def test_every_docstring_is_found_that_the_syntax_tree_has():
    """Of a package in which all sorts of code are documented."""
    found = {(d.name, d.summary, d.rest) for d in docstrings.read(["sphinx"])}

    def walk(node, name):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node
        ):
            summary, _, rest = ast.get_docstring(node).strip().partition("\n\n")
            yield name, " ".join(summary.split()), rest.strip()
        for child in ast.iter_child_nodes(node):
            yield from walk(
                child,
                f"{name}.{child.name}" if hasattr(child, "body") and hasattr(child, "name") and child.name else name,
            )

    expected = {
        doc for path, module in docstrings.modules("sphinx") for doc in walk(ast.parse(path.read_bytes()), module)
    }
    assert len(expected) > 1000 and {doc[1:] for doc in expected} == {doc[1:] for doc in found} and found <= expected


def test_names_and_code_are_pairs(monkeypatch):
    docs = [
        docstrings.Docstring(
            "p",
            "p.m",
            "p.m.CSVReader2.read_all",
            "f.py",
            1,
            "Read every row.",
            "Rows: all.",
            "def read_all(self):\n" + "    x\n" * 30,
        ),
        docstrings.Docstring("p", "p.m", "p.m.f", "f.py", 1, "Read one row.", "", "def f():\n    return 1"),
        docstrings.Docstring("_", "_", "_.__", "f.py", 1, "Nameless.", "Nobody knows.", ""),
    ]
    monkeypatch.setattr(installed, "_docs", lambda packages: docs)
    monkeypatch.setattr(installed, "_kept", lambda text: False)
    assert list(installed.READERS["docstrings.names", "pairs"]()) == [
        {"query": "CSV Reader 2 read all", "pos": ["Read every row.\nRows: all."]}
    ]
    assert list(installed.READERS["docstrings.code", "pairs"]()) == [
        {"query": "Read every row.", "pos": [docs[0].code]}
    ]


def test_further_paragraphs_are_pairs(monkeypatch):
    paragraphs = [
        "The second.",
        "Too short.",
        "It says this at some length, so that it can be told from what others say.",
        "    Indented, which it keeps, " + "and long " * 90,
    ]
    docs = [
        docstrings.Docstring(
            "p", "p.m", f"p.m.{i}", "f.py", 1, f"Summary {i}.", "\n \n".join(paragraphs[:2] + paragraphs[2:] * i)
        )
        for i in range(6)
    ]
    monkeypatch.setattr(installed, "_docs", lambda packages: docs)
    monkeypatch.setattr(installed, "_kept", lambda text: False)
    pairs = list(installed.READERS["docstrings.sections", "pairs"]())
    assert pairs[:2] == [
        {"query": "Summary 1.", "pos": [paragraphs[2]]},
        {"query": "Summary 1.", "pos": [paragraphs[3][: installed.NAMED]]},
    ]
    assert [sum(pair["query"] == f"Summary {i}." for pair in pairs) for i in range(6)] == [0, 2, 4, 6, 8, 8]


def test_library_reads_more_packages_than_docstrings(packages, monkeypatch):
    for package in ("core", "more"):
        folder = packages / (package if package == "core" else f"{places.TEXTS}/more")
        write(
            folder / "__init__.py",
            "\n".join(
                f'def f{i}():\n    """Number {i} of {package}.\n\n    It does {i} things in {package}.\n    """\n'
                for i in range(200)
            ),
        )
    monkeypatch.setattr(installed, "_docs", installed._docs.__wrapped__)
    of = {names: {doc.module for doc in installed.docs(packages=names)} for names in (("core",), ("core", "more"))}
    assert of == {("core",): {"core"}, ("core", "more"): {"core", "more"}}
    more = {"docstrings": installed.MORE_PACKAGES, "catalogues": tuple(catalogues.MORE_FOLDERS)}
    for (source, kind), reader in installed.READERS.items():
        first = source.partition(".")[0]
        if first in more:
            whole = installed.READERS[
                source.replace("docstrings", "library").replace("catalogues", "library.catalogues"), kind
            ]
            assert whole.args[0] is reader.args[0] and whole.args[2] is reader.args[2]
            assert whole.args[1].keywords["packages"] == reader.args[1].keywords["packages"] + more[first], source


def test_what_library_reads_is_installed_for_it():
    listed = [
        line.partition("==")[0]
        for line in (ROOT / "configs/library.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert "" not in listed and len({name.lower().replace("_", "-") for name in listed}) == len(listed)
    assert len(set(installed.MORE_PACKAGES) - set(installed.TRAINING_PACKAGES + installed.HELD_OUT_PACKAGES)) == len(
        installed.MORE_PACKAGES
    )
    assert set(catalogues.MORE_FOLDERS) < set(listed) and not set(catalogues.MORE_FOLDERS) & set(catalogues.FOLDERS)
    texts = Path(sysconfig.get_path("data"), places.TEXTS)
    if texts.is_dir():  # `make texts` takes minutes
        folders = set(installed.MORE_PACKAGES).union(*catalogues.MORE_FOLDERS.values())
        assert [folder for folder in sorted(folders) if not (texts / folder).is_dir()] == []


def test_documentation_added_from_outside_is_found(packages):
    write(
        packages / "zoo/added.py",
        'add_newdoc("zoo.core", "feed", """Feed it.\n\nWith meat.""")\nadd_docstr(zoo.water, '
        'r"""water(x)\n\nWith water.""")\n',
    )
    assert [(d.name, d.rest) for d in docstrings.read(["zoo"])] == [
        ("zoo.core.feed", "With meat."),
        ("zoo.water", "With water."),
    ]


def test_a_package_that_is_not_installed_is_named(packages):
    for read in (docstrings.read, catalogues.read):
        with pytest.raises(UserError, match="django: not installed here"):
            list(read(["django"]))


PO = r"""
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\n"

#. Default: "The page "
#. "\"${title}\" was moved."
msgid "page_moved"
msgstr "Die Seite \"${title}\" "
"wurde verschoben."

#, fuzzy
msgid "Not yet checked by anyone"
msgstr "Noch nicht"

msgid "Two words"
msgstr "Zwei Worte"

msgid "Not translated at all"
msgstr ""

msgid "Delete %d old file"
msgid_plural "Delete %d old files"
msgstr[0] "%d alte Datei löschen"
msgstr[1] "%d alte Dateien löschen"

#~ msgid "This one is obsolete"
#~ msgstr "Veraltet"
"""


def test_source_catalogues_give_whole_checked_sentences(packages):
    write(packages / "django/locale/de_AT/LC_MESSAGES/django.po", PO)
    write(packages / "django/locale/en_GB/LC_MESSAGES/django.po", PO)
    (packages / "django/locale/de_AT/LC_MESSAGES/django.mo").write_bytes(b"not read where there is a source")
    assert [tuple(m) for m in catalogues.read(["django"])] == [
        ("django", "de", "de_AT", 'The page "${title}" was moved.', 'Die Seite "${title}" wurde verschoben.'),
        ("django", "de", "de_AT", "Delete %d old file", "%d alte Datei löschen"),
    ]


def test_the_installed_catalogues_are_read_whole():
    found = list(catalogues.read())
    english = {m.english for m in found}
    assert len(found) > 200_000 and len(english) > 10_000 and len({m.language for m in found}) > 90
    assert {m.package for m in found} == set(catalogues.FOLDERS)
    assert all(len(m.english.split()) >= 3 and m.foreign and m.language != "en" for m in found)
    assert 0.17 < sum(map(catalogues.held_out, english)) / len(english) < 0.23


def test_compiled_and_source_catalogues_say_the_same():
    source = next(
        p
        for p in sorted(Path(sysconfig.get_path("purelib"), "django").rglob("de/LC_MESSAGES/django.po"))
        if p.with_suffix(".mo").exists()
    )
    compiled = {e: f for e, f in catalogues.read_mo(source.with_suffix(".mo")) if e}
    same = {e: f for e, f in catalogues.read_po(source) if e and f}
    assert len(same) > 50 and compiled == same


@pytest.mark.parametrize(
    "pack", [lambda path, data: path.write_bytes(data), lambda path, data: path.write_bytes(gzip.compress(data))]
)
@pytest.mark.parametrize(
    ("record", "kind", "read"),
    [
        ({"text": "a", "id": 7}, "text", {"text": "a"}),
        ({"text": "a", "label": "b"}, "label", {"text": "a", "label": "b"}),
        ({"instruction": "a", "output": "b"}, "instruction", {"instruction": "a", "input": "", "output": "b"}),
        ({"query": "a", "pos": "b"}, "pairs", {"query": "a", "pos": ["b"]}),
        (
            {"query": "a", "pos": ["b"], "neg": ["c", "d"], "score": 1},
            "pairs",
            {"query": "a", "pos": ["b"], "neg": ["c", "d"], "score": 1},
        ),
        ({"sentence1": "a", "sentence2": "b", "score": 0.5}, "sts", {"sentence1": "a", "sentence2": "b", "score": 0.5}),
    ],
)
def test_every_kind_of_record_is_read(tmp_path, pack, record, kind, read):
    path = tmp_path / ("x.jsonl.gz" if "gzip" in pack.__code__.co_names else "x.jsonl")
    pack(path, (json.dumps(record) + "\n\n").encode() * 3)
    assert list(files.read(path)) == [(kind, read)] * 3


def test_parquet_is_read_with_the_same_columns(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"query": "a", "pos": ["b", "c"], "neg": None}, {"query": "d", "pos": ["e"], "neg": ["f"]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert [record for _, record in files.read(tmp_path / "x.parquet")] == [{"query": "a", "pos": ["b", "c"]}, rows[1]]
    (tmp_path / "y.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match="y.parquet: not a Parquet file"):
        list(files.read(tmp_path / "y.parquet"))


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (GOOD + b"{broken\n", "line 2: broken JSON"),
        (GOOD + b"[1, 2]\n", "line 2: found a list; expected one JSON object a line"),
        (GOOD * 2 + b'{"txt": "x"}\n', r"line 3: found keys \['txt'\]"),
        (b'{"query": "x"}\n', "line 1: key 'pos' is missing from a pairs record"),
        (b'{"text": 3}\n', "line 1: 'text' is 3; expected text"),
        (b'{"query": "x", "pos": ["a", 1]}\n', "line 1: 'pos' is .*; expected list of texts or text"),
        (b'{"query": "x", "pos": []}\n', "line 1: 'pos' is empty"),
        (b'{"query": "x", "pos": ["a", ""]}\n', "line 1: 'pos' holds an empty text"),
        (b'{"sentence1": "", "sentence2": "a", "score": 1}\n', "line 1: 'sentence1' holds an empty text"),
        (b'{"sentence1": "x", "sentence2": "y", "score": "high"}\n', "line 1: 'score' is \"high\"; expected number"),
        (GOOD + b'{"query": "x", "pos": ["a"]}\n', "line 2: a pairs record in a file of text records"),
        (GOOD + b'{"text": "\xe9"}\n', "line 2: not UTF-8 .byte 0xe9 at column 11"),
        (b"", "holds no records"),
        (b"\n\n", "holds no records"),
    ],
)
def test_a_mistake_is_named_by_file_and_line(tmp_path, data, said):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"mine.jsonl: {said}") as error:
        list(files.read(path))
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_cut_off_archive_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        files.read(tmp_path / "absent.jsonl")
    for name, data in (("cut", gzip.compress(GOOD * 9000)[:-20]), ("plain", GOOD)):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(data)
        with pytest.raises(UserError, match=f"{name}.jsonl.gz: damaged or cut-off gzip"):
            list(files.read(tmp_path / f"{name}.jsonl.gz"))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
def test_a_file_that_the_system_refuses_to_read_is_named():
    with pytest.raises(UserError, match="mem: cannot be read"):  # its first byte belongs to no page
        list(files.read("/proc/self/mem"))
