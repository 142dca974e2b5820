"""A chat endpoint with OpenAI's API, which is asked again until it answers."""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from typing import Any

from conan_engine import languages

PROMPT = (
    "Translate the search query into {language}, as a native speaker would type it. Keep names, code and "
    "numbers as they are. Do not answer the query. "
    'Reply with JSON alone: {{"translation": "..."}}'
)
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # HTTP statuses after which the same request may succeed
LONGEST_WAIT = 60.0  # longest wait between two tries in seconds, unless the endpoint asks for more


class Unanswered(Exception):
    """The endpoint has not answered a request and will not."""


class Endpoint:
    """A chat endpoint that answers a limited number of requests at a time."""

    def __init__(self, url: str, model: str, key: str | None, requests: int, timeout: float, tries: int) -> None:
        import httpx  # an extra, which nothing else needs

        self.httpx, self.url, self.model, self.tries = httpx, f"{url.rstrip('/')}/chat/completions", model, tries
        limits = httpx.Limits(max_connections=requests, max_keepalive_connections=requests)
        self.client = httpx.AsyncClient(
            timeout=timeout, limits=limits, headers={"Authorization": f"Bearer {key}"} if key else {}
        )

    async def ask(self, query: str, language: str) -> dict[str, Any]:
        """Ask for one translation: {"answer": text or None, "finish": why it ended, "prompt": tokens, "completion":
        tokens}.

        Raises Unanswered when all tries have failed, and at once for an error that another try cannot mend.
        """
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
    """The result of `ask` from a response; None if it has no answer."""
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
    """The seconds that the endpoint asks to wait, given as seconds or as a date."""
    asked = response.headers.get("retry-after", "")
    try:
        return float(asked)
    except ValueError:
        pass
    try:
        return email.utils.parsedate_to_datetime(asked).timestamp() - time.time()
    except (TypeError, ValueError):
        return 0.0
