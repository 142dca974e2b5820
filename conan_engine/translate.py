"""Queries in other languages, for cross-lingual retrieval (recipe: CLR): `python -m conan_engine.translate
QUERIES.jsonl OUT.jsonl --endpoint URL
--model NAME`.

Asks a chat endpoint of OpenAI's form (vLLM, llama.cpp, Ollama, OpenAI, ...). Each query goes into one language, chosen
by --shares and --seed; its documents stay as they are. OUT is a source of the supervised stage, or of BEIR's queries
such a file again, with languages, to evaluate with; what cannot be a translation goes to OUT.rejected.jsonl, with the
reason. Interrupted, even by kill -9, the same command goes on: what was answered is in OUT.journal and is not paid for
twice. The key, if one is needed, is in OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import email.utils
import fcntl
import hashlib
import itertools
import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from conan_engine import __version__, command, languages
from conan_engine.data.sources import files, paths
from conan_engine.errors import UserError
from conan_engine.evaluation import retrieval

PROMPT = (
    "Translate the search query into {language}, as a native speaker would type it. Keep names, code and "
    "numbers as they are. Do not answer the query. "
    'Reply with JSON alone: {{"translation": "..."}}'
)
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # statuses after which the same request may succeed
LONGEST_WAIT = 60.0  # seconds between two tries, unless the endpoint asks for more


class Unanswered(Exception):
    """The endpoint has not answered a request, and will not."""


def language_of(number: int, query: str, seed: int, shares: dict[str, float]) -> str:
    """Which language the query goes into: the same whenever it is asked, whatever else the file holds."""
    digest = hashlib.blake2b(f"{seed}\n{number}\n{query}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    place = int.from_bytes(digest, "little") / 2**64
    for language, share in shares.items():
        place -= share
        if place < 0:
            return language
    return language  # what rounding left over


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


class Endpoint:
    """A chat endpoint, so many requests at a time."""

    def __init__(self, url: str, model: str, key: str | None, requests: int, timeout: float, tries: int) -> None:
        import httpx  # an extra: nothing else needs it

        self.httpx, self.url, self.model, self.tries = httpx, f"{url.rstrip('/')}/chat/completions", model, tries
        limits = httpx.Limits(max_connections=requests, max_keepalive_connections=requests)
        self.client = httpx.AsyncClient(
            timeout=timeout, limits=limits, headers={"Authorization": f"Bearer {key}"} if key else {}
        )

    async def ask(self, query: str, language: str) -> dict[str, Any]:
        """{"answer": the text or None, "finish": why it ended, "prompt": tokens, "completion": tokens}. Raises
        Unanswered after so many tries, and at once for what no other try can mend."""
        messages = [
            {"role": "system", "content": PROMPT.format(language=languages.NAMES[language])},
            {"role": "user", "content": query},
        ]
        for number in range(self.tries):
            wait = min(LONGEST_WAIT, 2.0**number) * random.uniform(0.5, 1)
            try:
                response = await self.client.post(
                    self.url, json={"model": self.model, "temperature": 0, "messages": messages}
                )
            except self.httpx.TransportError as error:  # timeouts, refused and broken connections
                said = str(error) or type(error).__name__
            except self.httpx.InvalidURL as error:
                raise Unanswered(f"{self.url}: {error}") from None
            else:
                if response.status_code == 200:
                    found = _read(response)
                    if found:
                        return found
                    said = "an answer that is none of OpenAI's form"
                else:
                    said = f"HTTP {response.status_code} {' '.join(response.text.split())[:200]}"
                    if response.status_code not in AGAIN:
                        raise Unanswered(f"{self.url}: {said}")
                    wait = max(wait, _retry_after(response))
            if number + 1 < self.tries:
                await asyncio.sleep(wait)
        raise Unanswered(f"{self.url}: {self.tries} tries failed; the last: {said}")


def _read(response):
    """What `ask` gives, of a response; None where it is none."""
    try:
        body = response.json()
        choice, usage = body["choices"][0], body.get("usage") or {}
        answer = choice["message"].get("content")
        return {
            "answer": answer if isinstance(answer, str) else None,
            "finish": choice.get("finish_reason"),
            "prompt": int(usage.get("prompt_tokens") or 0),
            "completion": int(usage.get("completion_tokens") or 0),
        }
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def _retry_after(response):
    """Seconds that the endpoint asks for: it gives them, or a date."""
    asked = response.headers.get("retry-after", "")
    try:
        return float(asked)
    except ValueError:
        pass
    try:
        return email.utils.parsedate_to_datetime(asked).timestamp() - time.time()
    except (TypeError, ValueError):
        return 0.0


class Journal:
    """What has been answered, a line an answer, on disk before the next is asked for. The first line says of what."""

    def __init__(self, path: str | Path, facts: dict[str, Any]) -> None:
        """Raises UserError where the journal of another command is there."""
        self.path, self.places, self.counts = Path(path), {}, Counter()
        self.file = open(self.path, "ab+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.path}: another process is writing here; wait for its end") from None
        self.file.seek(0)
        whole = 0
        for line in self.file:
            if not line.endswith(b"\n"):
                break  # cut off by a kill
            row = json.loads(line)
            if whole:
                self._note(row, whole)
            elif row != facts:
                different = ", ".join(
                    f"{key} was {row.get(key)!r}, is {facts[key]!r}" for key in facts if row.get(key) != facts[key]
                )
                raise UserError(
                    f"{self.path}: of another command ({different}); finish that one, or remove the file and pay again"
                )
            whole += len(line)
        self.file.truncate(whole)
        self.file.seek(whole)
        if not whole:
            self._write(facts)

    def add(self, row: dict[str, Any]) -> None:
        self._note(row, self.file.tell())
        self._write(row)

    def _note(self, row, place):
        self.places[row["number"]] = place
        self.counts[row.get("reason", "translated")] += 1
        for key in ("prompt", "completion"):
            self.counts[key] += row[key]

    def _write(self, row):
        self.file.write(_line(row))
        self.file.flush()

    def read(self, number: int) -> dict[str, Any]:
        """What was written of a query."""
        with open(self.path, "rb") as file:
            file.seek(self.places[number])
            return json.loads(file.readline())


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
                bar.set_postfix_str(_tokens(journal), refresh=False)
                bar.update()
                if failures:
                    return

        async with endpoint.client:
            await asyncio.gather(*(work() for _ in range(at_once)))
    if failures:
        raise UserError(
            f"{failures[0]}; {len(journal.places):,} queries are answered: the same command goes on behind them"
        )


def _line(row):
    """JSON that a person can read, unless it holds half of a character, which UTF-8 cannot say."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row).encode() + b"\n"


def _tokens(journal):
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
                    _line(
                        {"query": record[key], "language": language, "answer": row["answer"], "reason": row["reason"]}
                    )
                )
            else:
                good.write(_line({**record, key: row["query"], "language": language}))
                by_language[language] += 1
    for name, ready in zip(partial, (out, rejected)):
        os.replace(name, ready)
    return by_language


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"conan-engine {__version__}")
    parser.add_argument(
        "queries",
        help='{"query", "pos", "neg"} records, or BEIR\'s {"_id", "text"}, English: a file, or a folder or pattern '
        "of files",
    )
    parser.add_argument("out", type=Path, help="a .jsonl file")
    parser.add_argument("--endpoint", required=True, metavar="URL", help="such as http://localhost:8000/v1")
    parser.add_argument("--model", required=True, metavar="NAME", help="as the endpoint calls it")
    parser.add_argument(
        "--shares", default="paper", help='"paper", or a TOML file of language = share (default: paper)'
    )
    parser.add_argument("--seed", type=int, default=1, help="of the choice of languages (default: 1)")
    parser.add_argument("--requests", type=int, default=16, help="at a time (default: 16)")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one answer (default: 120)")
    parser.add_argument(
        "--tries", type=int, default=8, help="before it gives up, with ever longer waits between (default: 8)"
    )
    arguments = parser.parse_args()
    out, shares = arguments.out, languages.shares(arguments.shares)
    for key in ("requests", "tries", "timeout"):
        if getattr(arguments, key) <= 0:
            raise UserError(f"--{key} is {getattr(arguments, key)}; expected a number above 0")
    if out.exists():
        raise UserError(f"{out}: is there already; remove it, or name another")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: its folder does not exist; make it, or name another")
    try:
        endpoint = Endpoint(
            arguments.endpoint,
            arguments.model,
            os.environ.get("OPENAI_API_KEY"),
            arguments.requests,
            arguments.timeout,
            arguments.tries,
        )
    except ImportError:
        raise UserError("translate needs httpx, which is not installed; pip install httpx") from None
    sizes = [path.stat().st_size for path in paths.of(arguments.queries)]
    journal = Journal(
        out.with_suffix(".journal"),
        {
            "queries": arguments.queries,
            "bytes": sum(sizes),
            "model": arguments.model,
            "seed": arguments.seed,
            "shares": shares,
        },
    )
    asyncio.run(ask_for_all(arguments.queries, arguments.seed, shares, endpoint, journal, arguments.requests))
    by_language = write(arguments.queries, out, arguments.seed, shares, journal)
    journal.path.unlink()
    counts = journal.counts
    print(
        f"{out}: {by_language.total():,} queries, "
        + ", ".join(f"{count:,} {language}" for language, count in by_language.most_common())
    )
    reasons = {key: count for key, count in counts.items() if key not in ("translated", "prompt", "completion")}
    if reasons:
        print(
            f"{out.with_suffix('.rejected.jsonl')}: {sum(reasons.values()):,} rejected: "
            + ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
        )
    print(_tokens(journal))


if __name__ == "__main__":
    command.run(main)
