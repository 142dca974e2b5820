"""Translate English queries, for cross-lingual retrieval.

Each query goes into one language, drawn by --shares and --seed; its documents
stay as they are. A chat endpoint with OpenAI's API translates: vLLM, llama.cpp,
Ollama, OpenAI and others. Its key, if it needs one, is in OPENAI_API_KEY.
OUT has the form of QUERIES: pairs to train on, or queries of BEIR with their
language to evaluate with. Answers that cannot be translations go to
OUT.rejected.jsonl with the reason. Stopped or killed, the same command
continues; no answer is paid for twice.

Example:
    python -m conan_engine.translate pairs.jsonl out.jsonl \\
        --endpoint http://localhost:8000/v1 --model Qwen/Qwen2.5-7B-Instruct
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from conan_engine import command, languages
from conan_engine.data.sources import paths
from conan_engine.errors import UserError
from conan_engine.translation.endpoint import Endpoint
from conan_engine.translation.journal import Journal
from conan_engine.translation.queries import ask_for_all, tokens, write


def main() -> None:
    parser = command.Parser("translate", __doc__)
    parser.add_argument(
        "queries",
        metavar="QUERIES",
        help='English records {"query", "pos", "neg"}, or queries of BEIR {"_id", "text"}: a file, a folder or a '
        "pattern",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="a .jsonl file, which must not exist yet")
    parser.add_argument("--endpoint", required=True, metavar="URL", help="such as http://localhost:8000/v1")
    parser.add_argument("--model", required=True, metavar="NAME", help="the model's name at the endpoint")
    parser.add_argument("--shares", default="paper", metavar="FILE", help='"paper", or a TOML file of language = share')
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="draws the languages")
    parser.add_argument("--requests", type=int, default=16, metavar="N", help="requests at a time")
    parser.add_argument("--timeout", type=float, default=120, metavar="SECONDS", help="to wait for an answer")
    parser.add_argument(
        "--tries", type=int, default=8, metavar="N", help="tries per query, with longer and longer waits between"
    )
    arguments = parser.parse_args()
    out, shares = arguments.out, languages.shares(arguments.shares)
    for key in ("requests", "tries", "timeout"):
        if getattr(arguments, key) <= 0:
            raise UserError(f"--{key} is {getattr(arguments, key)}; expected a number above 0")
    if out.exists():
        raise UserError(f"{out}: exists already; remove it, or name another")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: its folder does not exist; create it, or name another")
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
