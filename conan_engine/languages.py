"""The languages of the recipe: their names, their shares, and checks of a translation."""

from __future__ import annotations

import json
import tomllib
import unicodedata
from collections import Counter
from pathlib import Path

from conan_engine.errors import UserError

# per cent of the cross-lingual queries (arXiv 2509.12892, section 3.3); as printed they add up to 106
PAPER = {
    "en": 25, "zh": 12, "es": 8, "fr": 6, "ja": 6, "de": 5, "ru": 5, "it": 4, "pt": 4, "ar": 3, "ko": 3, "bn": 2,
    "da": 2, "sv": 2, "th": 2, "ms": 2, "tr": 2, "vi": 2, "nl": 2, "pl": 2, "hi": 2, "km": 1, "fi": 1, "he": 1, "hu": 1,
    "no": 1,
}  # fmt: skip
NAMES = {
    "en": "English", "zh": "Simplified Chinese", "es": "Spanish", "fr": "French", "ja": "Japanese", "de": "German",
    "ru": "Russian", "it": "Italian", "pt": "Portuguese", "ar": "Arabic", "ko": "Korean", "bn": "Bengali",
    "da": "Danish", "sv": "Swedish", "th": "Thai", "ms": "Malay", "tr": "Turkish", "vi": "Vietnamese", "nl": "Dutch",
    "pl": "Polish", "hi": "Hindi", "km": "Khmer", "fi": "Finnish", "he": "Hebrew", "hu": "Hungarian", "no": "Norwegian",
}  # fmt: skip
# the first word of a letter's name in Unicode; a language that is not here writes LATIN
SCRIPTS = {
    "zh": ("CJK",), "ja": ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"), "ru": ("CYRILLIC",), "ar": ("ARABIC",),
    "ko": ("HANGUL", "CJK"),
    "bn": ("BENGALI",), "th": ("THAI",), "hi": ("DEVANAGARI",), "km": ("KHMER",), "he": ("HEBREW",),
}  # fmt: skip
OWN_SCRIPT = 0.1  # at least this share of the letters: names and code stay Latin in any language
# characters of a translation, divided by those of the English text: least and most
LENGTHS = {"zh": (0.08, 2.5), "ja": (0.12, 3), "ko": (0.15, 3)}
LENGTH = (0.35, 3.5)  # for all other languages
SLACK = 12  # characters by which both bounds give way: the translation of a single word may have any length


def shares(name: str) -> dict[str, float]:
    """The share of each language, adding up to 1: the paper's for "paper", or those of a TOML or JSON file of language
    = share. Raises UserError.
    """
    given = PAPER
    if name != "paper":
        try:
            text = Path(name).read_text(encoding="utf-8")
            given = json.loads(text) if name.endswith(".json") else tomllib.loads(text)
        except (OSError, ValueError) as error:
            raise UserError(
                f'{name}: cannot read these shares ({error}); expected "paper", or a TOML file of language = share'
            ) from None
    for language, share in given.items():
        if language not in NAMES:
            raise UserError(f"{name}: {language!r} is not a language of the recipe; expected one of {', '.join(NAMES)}")
        if type(share) not in (int, float) or not 0 <= share < float("inf"):
            raise UserError(f"{name}: {language} is {share!r}; expected a number, 0 or more")
    total = sum(given.values())
    if not total:
        raise UserError(f"{name}: all shares are 0; give one language a share above 0")
    return {language: share / total for language, share in given.items() if share}


def problem(text: str, source: str, language: str) -> str | None:
    """Why `text` cannot be the translation of `source`, an English text, into a language: a few words, or None."""
    if not text.strip():
        return "empty"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "half a character"
    if text.split() == source.split():
        return "a copy of the source"
    least, most = LENGTHS.get(language, LENGTH)
    length, of_source = len(text.strip()), len(source.strip())
    if length < least * (of_source - SLACK):
        return "too short"
    if length > most * (of_source + SLACK):
        return "too long"
    found = Counter(unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha())
    if found and sum(found[script] for script in SCRIPTS.get(language, ("LATIN",))) < OWN_SCRIPT * found.total():
        return "another script"
    if language == "ja" and found["CJK"] == found.total() > 20:
        return "another script"  # a sentence of this length without any kana is Chinese
    return None
