"""Training text that needs no download: the documentation and message catalogues of the packages installed here.

Held out, never seen in any stage: the docstrings of networkx and sympy, and a fifth of the English messages in every
language (`catalogues.held_out`).
"""

import functools
import hashlib
import random

from conan_engine.data.sources import catalogues, docstrings

TRAINING_PACKAGES = ("stdlib", "numpy", "torch", "django", "wagtail", "sphinx", "matplotlib", "scipy", "sklearn", "pandas")
HELD_OUT_PACKAGES = ("networkx", "sympy")

# Per cent of the cross-lingual pairs, recipe section 5 (Conan-embedding-v2, section 3.3); English is the other side.
LANGUAGE_SHARES = {
    "zh": 12, "es": 8, "fr": 6, "ja": 6, "de": 5, "ru": 5, "it": 4, "pt": 4, "ar": 3, "ko": 3, "bn": 2, "da": 2, "sv": 2,
    "th": 2, "ms": 2, "tr": 2, "vi": 2, "nl": 2, "pl": 2, "hi": 2, "km": 1, "fi": 1, "he": 1, "hu": 1, "no": 1,
}  # fmt: skip


@functools.cache  # several stages read them, and half a minute of parsing once is enough
def training_docs():
    """Docstrings to train on, each summary once: of two documents with one summary no search could tell which is meant."""
    return list({doc.summary: doc for doc in docstrings.read(TRAINING_PACKAGES)}.values())


@functools.cache
def training_messages():
    """Every message that is not held out, in every language."""
    return [m for m in catalogues.read() if not catalogues.held_out(m.english)]


def _doc_text():
    for doc in training_docs():
        yield {"text": f"{doc.summary}\n\n{doc.rest}"}


def _doc_instructions():
    for doc in training_docs():
        yield {"instruction": "", "input": doc.summary, "output": doc.rest}


def _doc_labels():
    """Which module is it from? The label's text is the module's name."""
    for doc in training_docs():
        yield {"text": doc.summary, "label": " ".join(doc.module.split(".")[:2])}


def _doc_sts():
    """Graded by structure: a summary and its own text 1, another text of the same module 0.5, of the same package 0.25,
    of another package 0."""
    docs = training_docs()
    by_module, by_package = {}, {}
    for doc in docs:
        by_module.setdefault(doc.module, []).append(doc)
        by_package.setdefault(doc.package, []).append(doc)
    chance = random.Random(0)
    for doc in docs:
        score, others = chance.choice(((1.0, [doc]), (0.5, by_module[doc.module]), (0.25, by_package[doc.package]), (0.0, docs)))
        other = chance.choice(others)
        if other is doc:
            score = 1.0
        yield {"sentence1": doc.summary, "sentence2": other.rest, "score": score}


def _shared_out():
    """Messages in the recipe's languages and shares: the most that keep to them, those beyond a share left out evenly."""
    kept = [m for m in training_messages() if m.language in LANGUAGE_SHARES]
    have = dict.fromkeys(LANGUAGE_SHARES, 0)
    for message in kept:
        have[message.language] += 1
    # the total is set by the languages that carry the most; a rare one gives all it has
    total = max(have[language] / share for language, share in LANGUAGE_SHARES.items() if share >= 5)
    for message in kept:
        wanted = total * LANGUAGE_SHARES[message.language] / have[message.language]
        if _fraction(message) < wanted:
            yield message


def _fraction(message):
    digest = hashlib.blake2b(f"{message.locale}\n{message.foreign}\n{message.english}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _message_text():
    for message in _shared_out():
        yield {"text": f"{message.foreign}\n{message.english}"}


def _message_instructions():
    for message in _shared_out():
        yield {"instruction": "", "input": message.foreign, "output": message.english}


def _message_sts():
    """A message in two languages 1; a message and another one of the same package 0.25; of another package 0."""
    messages = list(_shared_out())
    by_english, by_package = {}, {}
    for message in messages:
        by_english.setdefault(message.english, []).append(message)
        by_package.setdefault(message.package, []).append(message)
    chance = random.Random(0)
    for message in messages:
        others = chance.choice((by_english[message.english], by_package[message.package], messages))
        other = chance.choice(others)
        score = 1.0 if other.english == message.english else 0.25 if other.package == message.package else 0.0
        yield {"sentence1": message.foreign, "sentence2": other.foreign if other is not message else message.english, "score": score}


# (source, kind of record) -> reader
READERS = {
    ("docstrings", "text"): _doc_text,
    ("docstrings", "instruction"): _doc_instructions,
    ("docstrings.labels", "label"): _doc_labels,
    ("docstrings.sts", "sts"): _doc_sts,
    ("catalogues", "text"): _message_text,
    ("catalogues", "instruction"): _message_instructions,
    ("catalogues.sts", "sts"): _message_sts,
}
