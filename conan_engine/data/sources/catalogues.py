"""Sentences in up to a hundred languages: the gettext catalogues (.mo and .po) of installed packages."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from conan_engine.data.sources import places
from conan_engine.data.sources.processes import Pool

FOLDERS = {  # package -> its folder in site-packages
    "django": ["django"], "wagtail": ["wagtail"], "sphinx": ["sphinx"], "plone.app.locales": ["plone/app/locales"],
    "mercurial": ["mercurial"], "pretalx": ["pretalx"], "django-allauth": ["allauth"], "django-cms": ["cms"],
    "horizon": ["horizon", "openstack_dashboard"], "nova": ["nova"], "keystone": ["keystone"], "glance": ["glance"],
    "jupyterlab-language-pack-ja-JP": ["jupyterlab_language_pack_ja_JP"],
    "jupyterlab-language-pack-ko-KR": ["jupyterlab_language_pack_ko_KR"],
}  # fmt: skip
MORE_FOLDERS = {  # of the packages of `make texts`
    "gramps": ["share/locale"], "pretix": ["pretix"], "weblate": ["weblate"], "indico": ["indico"],
    "django-oscar": ["oscar"], "Trac": ["trac"], "ckan": ["ckan", "ckanext"], "geonode": ["geonode"],
    "shuup": ["shuup"], "deluge": ["deluge"], "spyder": ["spyder"], "misago": ["misago"], "thonny": ["thonny"],
    "postorius": ["postorius"], "mailman": ["mailman"], "wger": ["wger"], "neutron": ["neutron"], "cinder": ["cinder"],
    "django-filer": ["filer"], "django-machina": ["machina"], "djangorestframework": ["rest_framework"],
    "jupyterlab-language-pack-de-DE": ["jupyterlab_language_pack_de_DE"],
    "jupyterlab-language-pack-es-ES": ["jupyterlab_language_pack_es_ES"],
    "jupyterlab-language-pack-fr-FR": ["jupyterlab_language_pack_fr_FR"],
    "jupyterlab-language-pack-ru-RU": ["jupyterlab_language_pack_ru_RU"],
    "jupyterlab-language-pack-zh-CN": ["jupyterlab_language_pack_zh_CN"],
}  # fmt: skip


class Message(NamedTuple):
    package: str
    language: str  # the primary subtag: de, zh
    locale: str  # the whole: de, zh_Hans
    english: str
    foreign: str


def held_out(english: str) -> bool:
    """Whether a message is kept for the evaluation, in every language: a fifth of them, by a hash of the English
    text.
    """
    return int.from_bytes(hashlib.blake2b(english.encode(), digest_size=8).digest(), "little") % 5 == 0


def read(packages: Iterable[str] = tuple(FOLDERS)) -> Iterator[Message]:
    """Yield the Messages of packages: whole sentences (three words or more in English) that are really translated.

    A text that is in several catalogues of a language comes once. If a catalogue is there in both forms, the source is
    read: it may hold the English text where the compiled one holds only a name. Raises UserError for a package that is
    not installed.
    """
    files = [(package, path) for package in packages for path in _files(package)]
    seen = set()
    with Pool() as pool:
        for found in pool.map(_read_files, (files[i : i + 64] for i in range(0, len(files), 64))):
            for message in found:
                key = message.language, message.english, message.foreign
                if key not in seen:
                    seen.add(key)
                    yield message


def _files(package):
    for folder in {**FOLDERS, **MORE_FOLDERS}[package]:
        for path in sorted(places.find(package, folder).rglob("LC_MESSAGES/*.[mp]o")):
            if path.suffix == ".po" or not path.with_suffix(".po").exists():
                yield path


def _read_files(files):
    found = []
    for package, path in files:
        locale = path.parent.parent.name
        language = re.split("[_@-]", locale)[0].lower()
        language = {"nb": "no", "nn": "no"}.get(language, language)
        for english, foreign in read_mo(path) if path.suffix == ".mo" else read_po(path):
            english, foreign = " ".join(english.split()), " ".join(foreign.split())
            if language != "en" and len(english.split()) >= 3 and foreign and foreign != english:
                found.append(Message(package, language, locale, english, foreign))
    return found


def read_mo(path: Path) -> Iterator[tuple[str, str]]:
    """(English, translation) of a compiled catalogue; of a plural, the singular."""
    import polib  # imported here, since a machine that only trains on shards may lack it

    entries = {}
    for entry in polib.mofile(str(path)):
        message = entry.msgid if entry.msgctxt is None else f"{entry.msgctxt}\x04{entry.msgid}"
        key = (message, 0) if entry.msgid_plural else message
        entries[key] = entry.msgid, entry.msgstr_plural.get(0, "") if entry.msgid_plural else entry.msgstr
    # in the order in which the demo's scores were measured
    yield from (entries[key] for key in sorted(entries, key=lambda key: str((key, entries[key][1]))))


def read_po(path: Path) -> Iterator[tuple[str, str]]:
    """(English, translation) of a source catalogue, without fuzzy (unchecked) entries.

    Where the message id is a name, the English text is in its comment `Default: "..."`.
    """
    for entry in re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="replace")):
        fields, comment, current = {}, "", None
        for line in entry.splitlines():
            line = line.strip()
            if line.startswith('"'):
                fields[current] = fields.get(current, "") + _unquote(line)
            elif line.startswith("msg"):
                current, _, quoted = line.partition(" ")
                fields[current] = _unquote(quoted)
            elif line.startswith("#."):
                comment += line[2:]
            elif line.startswith("#,") and "fuzzy" in line:
                break
        else:
            default = (
                re.search(r'Default: ("(?:[^"\\]|\\.)*"(?:\s+"(?:[^"\\]|\\.)*")*)', comment)
                if "Default: " in comment
                else None
            )
            english = _unquote(default.group(1)) if default else fields.get("msgid", "")
            yield english, fields.get("msgstr") or fields.get("msgstr[0]", "")


def _unquote(text):
    """The value of one or several adjacent quoted strings, in the syntax of C."""
    if "\\" not in text and text.count('"') == 2:
        return text[1:-1]  # true for nearly all of a million lines, and much faster
    try:
        return ast.literal_eval(f"({text})")
    except (SyntaxError, ValueError):
        return ""  # a broken line counts as a missing translation
