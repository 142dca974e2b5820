"""Conversations to token ids, by the tokenizer's chat template, or joined as instruction and input are."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from conan_engine.errors import UserError


def turns(tokenizer: Any, conversations: Iterable[list[dict]]) -> Iterator[list[tuple[list[int], bool]]]:
    """The turns of each conversation, [(question, answer), ...] of token ids: what is learned, after everything
    before it.

    conversations: messages as chats.turns gives them. Raises UserError for a template that cannot be read, or that
    leaves out what should be learned.
    """
    return (_by_template if tokenizer.template else _joined)(tokenizer, conversations)


def _joined(tokenizer, conversations):
    """One message a line; an answer ends with the end token."""
    encoded = iter(
        tokenizer.encode_batch(
            [message["content"] + "\n" * (not message["learn"]) for messages in conversations for message in messages]
        )
    )
    for messages in conversations:
        question, found = list(tokenizer.prefix), []
        for message in messages:
            ids = next(encoded)
            if message["learn"]:
                found.append((question, ids + [tokenizer.eos_id]))
                question = []
            else:
                question = question + ids
        yield found


def _by_template(tokenizer, conversations):
    """The template's text as a whole, encoded as transformers does; a token that begins before an answer and ends in
    it belongs to the answer.
    """
    conversations = [
        messages[: 1 + max(i for i, message in enumerate(messages) if message["learn"])] for messages in conversations
    ]
    rendered = [render(tokenizer, messages) for messages in conversations]
    for messages, text, (ids, places) in zip(conversations, rendered, tokenizer.encode_with_special(rendered)):
        found, at = [], 0
        for begin, end in answers(messages, text):
            middle = next((i for i in range(at, len(ids)) if places[i][1] > begin), len(ids))
            behind = next((i for i in range(middle, len(ids)) if places[i][0] >= end), len(ids))
            found.append((ids[at:middle], ids[middle:behind]))
            at = behind
        yield found


def answers(messages: list[dict], text: str) -> Iterator[tuple[int, int]]:
    """Where the answers are in a rendered text, (begin, end) each: the message and what ends it. The last message is
    an answer.
    """
    spans, at = [], 0
    for message in messages:
        content = message["content"].strip()
        begin = text.find(content, at)
        if begin < 0:
            raise UserError(
                f"the tokenizer's chat template leaves out what a message says ({content[:60]!r}); remove "
                "chat_template from tokenizer_config.json, or such messages from the data"
            )
        at = begin + len(content)
        if message["learn"]:
            spans.append((begin, at))
    ending = text[at:].rstrip()
    for begin, end in spans:
        yield begin, end + len(ending) * text.startswith(ending, end)


def render(tokenizer: Any, messages: list[dict]) -> str:
    """A conversation as text, by the tokenizer's template. Raises UserError with the template's own words if it
    refuses the conversation.
    """
    plain = [{key: value for key, value in message.items() if key != "learn"} for message in messages]
    try:
        return _compiled(tokenizer.template).render(
            messages=plain,
            tools=None,
            documents=None,
            add_generation_prompt=False,
            bos_token=tokenizer.begin,
            eos_token=tokenizer.end,
        )
    except jinja2.TemplateError as error:
        raise UserError(
            f"the tokenizer's chat template: {' '.join(str(error).split())}; remove "
            "chat_template from tokenizer_config.json, or such conversations from the data"
        ) from None


@functools.lru_cache(8)
def _compiled(template):
    """The template as transformers compiles it: in a sandbox, without lines that only hold tags."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None, **_: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    return environment.from_string(template)


class _Generation(Extension):
    """{% generation %} marks what the assistant says; here it does nothing."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
