"""Queries in other languages, for cross-lingual retrieval (recipe: CLR).

    python -m conan_engine.translate QUERIES.jsonl OUT.jsonl --endpoint URL --model NAME

Asks a chat endpoint of OpenAI's form (vLLM, llama.cpp, Ollama, OpenAI, ...). Each query goes into one language, chosen
by --shares and --seed; its documents stay as they are. OUT is a source of the supervised stage, or of BEIR's queries
such a file again, with languages, to evaluate with; what cannot be a translation goes to OUT.rejected.jsonl, with the
reason. Interrupted, even by kill -9, the same command goes on: what was answered is in OUT.journal and is not paid for
twice. The key, if one is needed, is in OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path

from conan_engine import __version__, command, languages
from conan_engine.data.sources import paths
from conan_engine.errors import UserError
from conan_engine.translation.endpoint import Endpoint
from conan_engine.translation.journal import Journal
from conan_engine.translation.queries import ask_for_all, tokens, write


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
    print(tokens(journal))


if __name__ == "__main__":
    command.run(main)
