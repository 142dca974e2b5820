"""Queries on their way into other languages: which one each goes into, what comes back, what is kept."""

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
    """Which language the query goes into: the same whenever it is asked, whatever else the file holds."""
    digest = hashlib.blake2b(f"{seed}\n{number}\n{query}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    place = int.from_bytes(digest, "little") / 2**64
    for language, share in shares.items():
        place -= share
        if place < 0:
            return language
    return language  # what rounding left over


def queries(path: str | Path) -> Any:
    """(number, record, the query's key in it) of each record, from 0."""
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
                f'{path}: holds neither {{"query", "pos"}} records nor BEIR\'s queries, {{"_id", '
                f'"text"}}, which translate takes'
            )
        yield number, record, key


def translation_in(answer: str) -> str | None:
    """The translation in a model's answer, which may have more around its JSON; None where there is none."""
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
    """A row of the journal, but for its number, of what the endpoint said to a query."""
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
    """Until the journal has an answer for each query, or the endpoint gives none. Raises UserError then; what is under
    way is finished first."""

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
            f"{failures[0]}; {len(journal.places):,} queries are answered: the same command goes on behind them"
        )


def tokens(journal: Journal) -> str:
    return f"{journal.counts['prompt']:,} prompt and {journal.counts['completion']:,} completion tokens"


def write(path: str | Path, out: str | Path, seed: int, shares: dict[str, float], journal: Journal) -> Any:
    """OUT and OUT.rejected.jsonl, in the order of the queries; returns {language: so many}."""
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
