"""Conversations to token ids, by the tokenizer's chat template, or joined as instruction and input are."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from conan_engine.data.sources.bad import Bad, short
from conan_engine.errors import UserError


class Rendered(NamedTuple):
    """A conversation as its template writes it, and where the answers are in it, (begin, end) each."""

    text: str
    answers: list[tuple[int, int]]


def turns(tokenizer: Any, conversations: Iterable[list[dict] | Rendered]) -> Iterator[list[tuple[list[int], list]]]:
    """The turns of each conversation, [(question, answer), ...] of token ids: what is learned, after everything
    before it.

    conversations: `render` of each where the tokenizer has a template, else messages as chats.turns gives them.
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
    encoded = tokenizer.encode_with_special([conversation.text for conversation in conversations])
    for conversation, (ids, places) in zip(conversations, encoded):
        found, at = [], 0
        for begin, end in conversation.answers:
            middle = next((i for i in range(at, len(ids)) if places[i][1] > begin), len(ids))
            behind = next((i for i in range(middle, len(ids)) if places[i][0] >= end), len(ids))
            found.append((ids[at:middle], ids[middle:behind]))
            at = behind
        yield found


def render(tokenizer: Any, messages: list[dict]) -> Rendered:
    """A conversation, up to its last answer, by the tokenizer's template.

    Raises UserError if the template cannot be read, and Bad, with the template's own words, if it refuses the
    conversation or leaves out what a message says.
    """
    messages = messages[: 1 + max(i for i, message in enumerate(messages) if message["learn"])]
    plain = [{key: value for key, value in message.items() if key != "learn"} for message in messages]
    try:
        text = _compiled(tokenizer.template).render(
            messages=plain,
            tools=None,
            documents=None,
            add_generation_prompt=False,
            bos_token=tokenizer.begin,
            eos_token=tokenizer.end,
        )
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the tokenizer's chat template cannot be read ({_line(error)}); mend chat_template in "
            "tokenizer_config.json, or remove it"
        ) from None
    except jinja2.TemplateError as error:
        raise Bad(
            "refused by the chat template",
            f"the tokenizer's chat template refuses it ({_line(error)}); leave it out, or remove chat_template from "
            "tokenizer_config.json",
        ) from None
    return Rendered(text, list(_answers(messages, text)))


def _line(error):
    return " ".join(str(error).split())


def _answers(messages, text):
    """Where the answers are in a rendered text: the message and what ends it. The last message is an answer."""
    spans, at = [], 0
    for message in messages:
        content = message["content"].strip()
        begin = text.find(content, at)
        if begin < 0:
            raise Bad(
                "refused by the chat template",
                f"the tokenizer's chat template leaves out what a message says ({short(content)}); leave the "
                "conversation out, or remove chat_template from tokenizer_config.json",
            )
        at = begin + len(content)
        if message["learn"]:
            spans.append((begin, at))
    ending = text[at:].rstrip()
    for begin, end in spans:
        yield begin, end + len(ending) * text.startswith(ending, end)


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
