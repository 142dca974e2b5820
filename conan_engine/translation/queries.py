"""Translate queries: choose a language for each, ask, check the answers, and write the files."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from conan_engine import languages
from conan_engine.data.sources import files, paths
from conan_engine.errors import UserError
from conan_engine.evaluation import retrieval
from conan_engine.translation.endpoint import Endpoint, Unanswered
from conan_engine.translation.journal import Journal, line


def language_of(number: int, query: str, seed: int, shares: dict[str, float]) -> str:
    """The language that a query is translated into. It does not depend on the other queries of the file."""
    digest = hashlib.blake2b(f"{seed}\n{number}\n{query}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    place = int.from_bytes(digest, "little") / 2**64
    for language, share in shares.items():
        place -= share
        if place < 0:
            return language
    return language  # the remainder that rounding left


def queries(path: str | Path) -> Any:
    """(number from 0, record, the key of the query in it) of each record."""
    places = paths.of(path)
    _, first = next(iter(files.rows(places[0])), ("", {}))
    if {"_id", "text"} <= first.keys():
        every = itertools.chain.from_iterable(map(retrieval.read_queries, places))
        records = (("text", {"_id": query.id, "text": query.text}) for query in every)
    else:
        records = (("query" if kind == "pairs" else None, record) for kind, record in files.read(path))
    for number, (key, record) in enumerate(records):
        if key is None:
            raise UserError(
                f'{path}: holds other records; expected {{"query", "pos"}} records, or queries of BEIR, {{"_id", '
                f'"text"}}'
            )
        yield number, record, key


def translation_in(answer: str) -> str | None:
    """The translation in a model's answer, which may have text around its JSON; None if there is none."""
    decoder = json.JSONDecoder()
    for start, character in enumerate(answer):
        if character == "{":
            try:
                found, _ = decoder.raw_decode(answer, start)
            except ValueError:
                continue
            if isinstance(found.get("translation"), str):
                return found["translation"].strip()
    return None


def judged(found: Any, query: str, language: str) -> Any:
    """The journal's row for an answer, without its number: the translation, or why it is rejected."""
    row = {"language": language, "prompt": found["prompt"], "completion": found["completion"]}
    translation = translation_in(found["answer"] or "")
    reason = (
        "cut off"
        if found["finish"] == "length"
        else "no JSON"
        if translation is None
        else languages.problem(translation, query, language)
    )
    return row | ({"reason": reason, "answer": found["answer"]} if reason else {"query": translation})


async def ask_for_all(
    path: str | Path, seed: int, shares: dict[str, float], endpoint: Endpoint, journal: Journal, at_once: int
) -> None:
    """Ask until the journal has an answer for each query.

    Raises UserError if the endpoint stops answering, after the requests under way have ended.
    """

    def foreign():
        for number, record, key in queries(path):
            language = language_of(number, record[key], seed, shares)
            if language != "en":
                yield number, record[key], language

    todo = (choice for choice in foreign() if choice[0] not in journal.places)
    failures, total = [], sum(1 for _ in foreign())
    with tqdm(desc="asked", unit=" queries", initial=len(journal.places), total=total, mininterval=0.5) as bar:

        async def work():
            for number, query, language in todo:
                try:
                    found = await endpoint.ask(query, language)
                except Unanswered as error:
                    failures.append(error)
                    return
                journal.add({"number": number, **judged(found, query, language)})
                bar.set_postfix_str(tokens(journal), refresh=False)
                bar.update()
                if failures:
                    return

        async with endpoint.client:
            await asyncio.gather(*(work() for _ in range(at_once)))
    if failures:
        raise UserError(
            f"{failures[0]}; {len(journal.places):,} queries are answered: run the same command again to continue"
        )


def tokens(journal: Journal) -> str:
    return f"{journal.counts['prompt']:,} prompt and {journal.counts['completion']:,} completion tokens"


def write(path: str | Path, out: str | Path, seed: int, shares: dict[str, float], journal: Journal) -> Any:
    """Write OUT and OUT.rejected.jsonl in the order of the queries; returns {language: count}."""
    rejected, by_language = out.with_suffix(".rejected.jsonl"), Counter()
    partial = [Path(f"{name}.partial") for name in (out, rejected)]
    with open(partial[0], "wb") as good, open(partial[1], "wb") as bad:
        for number, record, key in queries(path):
            language = language_of(number, record[key], seed, shares)
            row = {"query": record[key]} if language == "en" else journal.read(number)
            if "reason" in row:
                bad.write(
                    line({"query": record[key], "language": language, "answer": row["answer"], "reason": row["reason"]})
                )
            else:
                good.write(line({**record, key: row["query"], "language": language}))
                by_language[language] += 1
    for name, ready in zip(partial, (out, rejected)):
        os.replace(name, ready)
    return by_language
