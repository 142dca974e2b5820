"""Training text without a download: documentation and message catalogues of the packages installed here.

Held out, and never seen in any stage: the docstrings of networkx and sympy, and a fifth of the English messages in
every language (`catalogues.held_out`). A fiftieth of the rest is for validation, in the sources that end in
".validation". "docstrings" and "catalogues" read the packages that the engine's set-up installs; "library" and
"library.catalogues" add those of `make texts`.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from conan_engine.data.sources import catalogues, code_files, docstrings
from conan_engine.languages import PAPER

if TYPE_CHECKING:
    from conan_engine.data.sources.catalogues import Message
    from conan_engine.data.sources.code_files import CodeFile
    from conan_engine.data.sources.docstrings import Docstring


TRAINING_PACKAGES = (
    "stdlib", "numpy", "torch", "django", "wagtail", "sphinx", "matplotlib", "scipy", "sklearn", "pandas",
    "transformers", "polars", "huggingface_hub", "mteb", "datasets", "sentence_transformers", "pydantic",
)  # fmt: skip
MORE_PACKAGES = (
    "Bio", "IPython", "MDAnalysis", "SCons", "aif360", "aiida", "airflow", "alibi", "allennlp", "altair", "angr",
    "ansible", "arch", "asciimatics", "ase", "astroid", "astropy", "astroquery", "atomate2", "autogluon", "behave",
    "bids", "blackjax", "bokeh", "boltons", "botorch", "breezy", "brian2", "bson", "captum", "celery", "cherrypy",
    "cinder", "cirq", "ckan", "climpred", "cobra", "composer", "conan", "control", "coverage", "cvxpy", "dagster",
    "darts", "dash", "dask", "deepchem", "deluge", "dendropy", "dgl", "diffusers", "dipy", "discord", "distributed",
    "docutils", "dowhy", "dspy", "dulwich", "econml", "elasticsearch", "fairlearn", "faker", "falcon", "featuretools",
    "filer", "fipy", "flair", "flask", "flax", "geonode", "geopandas", "git", "gluonts", "gpytorch", "gramps",
    "great_expectations", "gridfs", "gwpy", "gymnasium", "haiku", "haystack", "holoviews", "ibis", "ignite", "imageio",
    "imodels", "indico", "intake", "iris", "jax", "jupyter_server", "kedro", "keras", "kornia", "langchain",
    "langchain_core", "libpysal", "librosa", "lifelines", "lightkurve", "lightly", "linearmodels", "litestar",
    "llama_index", "lmfit", "luigi", "machina", "mailman", "manim", "matminer", "mdtraj", "megatron", "mesonbuild",
    "metpy", "misago", "mlflow", "mne", "monai", "more_itertools", "moviepy", "music21", "napari", "napari_builtins",
    "nengo", "neo4j", "neuralforecast", "neutron", "nibabel", "nilearn", "nipype", "nltk", "numba", "numpyro", "openai",
    "openmdao", "openmm", "openstack", "optax", "optuna", "oscar", "osmnx", "pandapower", "paramiko", "parsl", "peft",
    "pennylane", "pettingzoo", "pgmpy", "photutils", "pint", "plotnine", "poetry", "prefect", "pretix",
    "prompt_toolkit", "py2neo", "pycaret", "pydicom", "pyglet", "pylint", "pymatgen", "pymc", "pymongo", "pyod",
    "pyomo", "pypdf", "pypsa", "pyqtgraph", "pyramid", "pyro", "pytorch_lightning", "pyvista", "qcodes", "qiskit",
    "rdflib", "redis", "rest_framework", "robot", "rope", "sanic", "satpy", "scapy", "scrapy", "seaborn", "shap",
    "shuup", "signac", "skbio", "skimage", "skorch", "sktime", "speechbrain", "spyder", "sqlalchemy", "sqlfluff",
    "sqlglot", "stable_baselines3", "stanza", "statsforecast", "statsmodels", "strawberry", "streamlit", "sunpy",
    "tables", "telegram", "tensorflow_datasets", "tensorflow_probability", "textual", "thonny", "timm",
    "torch_geometric", "torchaudio", "torchio", "torchmetrics", "torchvision", "tornado", "tox", "trac", "traitlets",
    "trax", "trimesh", "trl", "tsfresh", "tslearn", "twisted", "urwid", "vispy", "weblate", "werkzeug", "xarray",
    "xlsxwriter", "zarr",
)  # fmt: skip
HELD_OUT_PACKAGES = ("networkx", "sympy")

SHORTEST_CODE = 120  # shortest code in characters, with its first line; less says little
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")  # a word of a name: readCSVFile2 has four
PARAGRAPH = re.compile(r"\n\s*\n")
SHORTEST_SECTION = 60  # shortest section in characters
SECTIONS = 8
NAMED = 500  # longest text in characters of what a name stands for

# English is the other side of each pair.
LANGUAGE_SHARES = {language: share for language, share in PAPER.items() if language != "en"}


@functools.cache  # several stages read them
def _docs(packages):
    """Each summary once, preferably with more text: of two documents with the same summary, no search could tell
    which is meant.
    """
    return list(
        {doc.summary: doc for doc in sorted(docstrings.read(packages), key=lambda doc: doc.rest != "")}.values()
    )


@functools.cache
def _messages(packages):
    return [m for m in catalogues.read(packages) if not catalogues.held_out(m.english)]


def docs(validation: bool = False, packages: tuple[str, ...] = TRAINING_PACKAGES) -> Iterable[Docstring]:
    """Docstrings with more than a summary, for training or validation; all with the same text are on one side."""
    return [doc for doc in _all_docs(validation, packages) if doc.rest]


def functions(validation: bool = False, packages: tuple[str, ...] = TRAINING_PACKAGES) -> Iterable[Docstring]:
    """Docstrings of functions, with or without more than a summary, for training or validation."""
    return [doc for doc in _all_docs(validation, packages) if len(doc.code) >= SHORTEST_CODE]


def _all_docs(validation, packages):
    return [doc for doc in _docs(packages) if _kept(doc.rest or doc.summary) is validation]


def messages(validation: bool = False, packages: tuple[str, ...] = tuple(catalogues.FOLDERS)) -> Iterable[Message]:
    """Messages in every language, for training or validation, by their English."""
    return [m for m in _messages(packages) if _kept(m.english) is validation]


def _kept(text):
    return fraction(text) < 0.02


def code(validation: bool = False, packages: tuple[str, ...] = TRAINING_PACKAGES) -> Iterable[CodeFile]:
    """Files of source code, for training or validation, without copies of the held-out packages."""
    return (file for file in code_files.read(packages, HELD_OUT_PACKAGES) if _kept(file.text) is validation)


def _code_text(files):
    for file in files:
        yield {"text": file.text}


def _doc_text(docs):
    for doc in docs:
        yield {"text": f"{doc.summary}\n\n{doc.rest}"}


def _doc_instructions(docs):
    for doc in docs:
        yield {"instruction": "", "input": doc.summary, "output": doc.rest}


def _doc_names(docs):
    """The last two parts of a dotted name, in words -> what it stands for; each name once."""
    named = {" ".join(part for name in doc.name.split(".")[-2:] for part in WORD.findall(name)): doc for doc in docs}
    for words, doc in named.items():
        if words:  # false for
            yield {"query": words, "pos": [f"{doc.summary}\n{doc.rest}"[:NAMED]]}


def _doc_sections(docs):
    """First paragraph -> each paragraph after the second, up to SECTIONS per text."""
    for doc in docs:
        further = [p for p in PARAGRAPH.split(doc.rest)[1:] if len(p) >= SHORTEST_SECTION]
        for paragraph in further[:SECTIONS]:
            yield {"query": doc.summary, "pos": [paragraph[:NAMED]]}


def _doc_code(docs):
    for doc in docs:
        yield {"query": doc.summary, "pos": [doc.code]}


def _doc_labels(docs):
    """Summary -> the name of its module, as the label's text."""
    for doc in docs:
        yield {"text": doc.summary, "label": " ".join(doc.module.split(".")[:2])}


def doc_sts(docs: list[Docstring]) -> Iterator[dict]:
    """Pairs graded by structure: a summary with its own text 1, with a text of the same module 0.5, of the same
    package 0.25, of another package 0.
    """
    by_module, by_package = {}, {}
    for doc in docs:
        by_module.setdefault(doc.module, []).append(doc)
        by_package.setdefault(doc.package, []).append(doc)
    chance = random.Random(0)
    for doc in docs:
        score, others = chance.choice(
            ((1.0, [doc]), (0.5, by_module[doc.module]), (0.25, by_package[doc.package]), (0.0, docs))
        )
        other = chance.choice(others)
        if other is doc:
            score = 1.0
        yield {"sentence1": doc.summary, "sentence2": other.rest, "score": score}


def _shared_out(messages):
    """As many messages as keep to the recipe's languages and shares; those beyond a share are left out evenly."""
    kept = [m for m in messages if m.language in LANGUAGE_SHARES]
    have = dict.fromkeys(LANGUAGE_SHARES, 0)
    for message in kept:
        have[message.language] += 1
    # the languages with the most messages set the total; a rare one gives all it has
    total = max(have[language] / share for language, share in LANGUAGE_SHARES.items() if share >= 5)
    for message in kept:
        wanted = total * LANGUAGE_SHARES[message.language] / have[message.language]
        if fraction(f"{message.locale}\n{message.foreign}\n{message.english}") < wanted:
            yield message


def fraction(text: str) -> float:
    """A number from 0 to 1, by a hash of the text."""
    return (
        int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") / 2**64
    )


def _message_text(messages):
    for message in _shared_out(messages):
        yield {"text": f"{message.foreign}\n{message.english}"}


def _message_instructions(messages):
    for message in _shared_out(messages):
        yield {"instruction": "", "input": message.foreign, "output": message.english}


def message_sts(messages: Iterable[Message]) -> Iterator[dict]:
    """A message in two languages 1; with another message of the same package 0.25, of another package 0."""
    messages = list(_shared_out(messages))
    by_english, by_package = {}, {}
    for message in messages:
        by_english.setdefault(message.english, []).append(message)
        by_package.setdefault(message.package, []).append(message)
    chance = random.Random(0)
    for message in messages:
        others = chance.choice((by_english[message.english], by_package[message.package], messages))
        other = chance.choice(others)
        score = 1.0 if other.english == message.english else 0.25 if other.package == message.package else 0.0
        yield {
            "sentence1": message.foreign,
            "sentence2": other.foreign if other is not message else message.english,
            "score": score,
        }


def translations(messages: Iterable[Message]) -> Iterator[dict]:
    """Half of the pairs are one message in two languages, 1; the others are two messages in any languages, 0."""
    messages = list(_shared_out(messages))
    by_english = {}
    for message in messages:
        by_english.setdefault(message.english, []).append(message)
    chance = random.Random(0)
    for message in messages:
        other = chance.choice(by_english[message.english] if chance.random() < 0.5 else messages)
        text = other.foreign if other is not message else message.english
        yield {"sentence1": message.foreign, "sentence2": text, "score": float(other.english == message.english)}


def _read(records, of, validation):
    return records(of(validation))


def _readers():
    """(source, kind of record, records, package names) of each built-in source."""
    for source, packages in (("docstrings", TRAINING_PACKAGES), ("library", TRAINING_PACKAGES + MORE_PACKAGES)):
        texts, with_code = functools.partial(docs, packages=packages), functools.partial(functions, packages=packages)
        yield source, "text", _doc_text, texts
        yield f"{source}.source", "text", _code_text, functools.partial(code, packages=packages)
        yield source, "instruction", _doc_instructions, texts
        yield f"{source}.names", "pairs", _doc_names, texts
        yield f"{source}.sections", "pairs", _doc_sections, texts
        yield f"{source}.code", "pairs", _doc_code, with_code
        yield f"{source}.labels", "label", _doc_labels, texts
        yield f"{source}.sts", "sts", doc_sts, texts
    for source, packages in (
        ("catalogues", catalogues.FOLDERS),
        ("library.catalogues", catalogues.FOLDERS | catalogues.MORE_FOLDERS),
    ):
        texts = functools.partial(messages, packages=tuple(packages))
        yield source, "text", _message_text, texts
        yield source, "instruction", _message_instructions, texts
        yield f"{source}.sts", "sts", message_sts, texts
        yield f"{source}.translations", "sts", translations, texts


# (source, kind of record) -> reader
READERS = {
    (f"{source}{'.validation' if validation else ''}", kind): functools.partial(_read, records, of, validation)
    for validation in (False, True)
    for source, kind, records, of in _readers()
}
