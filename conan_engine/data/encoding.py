"""Encode records to token ids, as a shard writer takes them."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from conan_engine.data import chat_template
from conan_engine.data.shard_writer import Records

BATCH = (1024, 2**20)  # a batch ends at so many records, or characters


def batches(records: Iterable[dict]) -> Iterator[list[dict]]:
    """Group records (dicts of text) into lists whose size bounds memory."""
    batch, characters = [], 0
    for record in records:
        batch.append(record)
        characters += sum(map(_size, record.values()))
        if len(batch) == BATCH[0] or characters >= BATCH[1]:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _size(value):
    """The characters of a record's value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(
            len(item["content"] if isinstance(item, dict) else item)
            for item in value
            if not isinstance(item, float | int)
        )
    return 0


def encode(tokenizer: Any, shape: str, batch: list[dict], max_tokens: int) -> Records:
    """Encode a batch of dicts as Records of a shape (a key of shards.FIELDS); conversations that are too long are
    left out. Where the tokenizer has a chat template, those have a key "rendered" (chat_template.render).
    """
    records = list(_ENCODE[shape](tokenizer, batch, max_tokens))
    fields = [field for record in records for field in record[0]]
    return Records(
        np.fromiter(itertools.chain.from_iterable(fields), np.int32),
        np.array([len(field) for field in fields], np.int64),
        np.array([len(record[0]) for record in records], np.int64),
        np.array([score for _, score, _ in records], np.float32),
        np.array([group for _, _, group in records], np.int64),
    )


def join(instruction: str, text: str) -> str:
    """Instruction and input as one text, which is the query of the contrastive stages."""
    return f"{instruction}\n{text}" if instruction and text else instruction or text


def _group(value):
    """63 bits that stand for a text or class. Documents of one group are never each other's negatives."""
    return (
        int.from_bytes(hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") >> 1
    )


# Each returns, for a batch of a source's records, the fields, the score and the group of each record to write.


def _encode_text(tokenizer, batch, _):
    """The text and an end-of-text token; the loader splits what is longer than max_tokens."""
    texts = [_whole(record) for record in batch]
    prefix, end = tokenizer.prefix, [tokenizer.eos_id]
    for tokens in tokenizer.encode_batch(texts):
        yield [prefix + tokens + end if prefix else tokens + end], math.nan, 0


def _whole(record):
    """All that a record says, as one text."""
    if "text" in record:
        return record["text"]
    if "messages" in record:
        return "\n".join(message["content"] for message in record["messages"])
    return f"{join(record['instruction'], record['input'])}\n{record['output']}"


def _encode_instructions(tokenizer, batch, max_tokens):
    if "messages" in batch[0]:  # all records of a source are of one kind
        return _encode_conversations(tokenizer, batch, max_tokens)
    return _encode_alone(tokenizer, batch, max_tokens)


def _encode_conversations(tokenizer, batch, max_tokens):
    """Question and answer in turn, as many as fit: a question is whole or left out, the last answer may be cut.

    A conversation whose first question leaves no room is None.
    """
    form = "rendered" if tokenizer.template else "messages"
    for turns in chat_template.turns(tokenizer, [record[form] for record in batch]):
        fields, room = [[]], max_tokens
        for question, answer in turns:
            if len(question) >= room:
                break
            fields += [question, answer[: room - len(question)]]
            room -= len(question) + len(answer)
        if len(fields) > 1:
            yield fields, math.nan, 0


def _encode_alone(tokenizer, batch, max_tokens):
    """Cut the input to half the room, then the end of the output, so that something is left to learn."""
    encoded = tokenizer.encode_batch(
        [text for r in batch for text in (r["instruction"], r["input"] + "\n", r["output"])]
    )
    for instruction, text, output in zip(encoded[::3], encoded[1::3], encoded[2::3]):
        instruction = tokenizer.prefix + instruction
        instruction = instruction[: max_tokens // 4]
        text = text[: max_tokens // 2 - len(instruction)] if len(text) > max_tokens // 4 else text
        yield (
            [instruction, text, (output + [tokenizer.eos_id])[: max_tokens - len(instruction) - len(text)]],
            math.nan,
            0,
        )


def _encode_pairs(tokenizer, batch, max_tokens):
    """One record per positive; its group is the positive's text, or the class."""
    flat = [(r, positive) for r in batch for positive in r["pos"]]
    encoded = iter(
        tokenizer.encode_texts(
            [t for r, positive in flat for t in (r["query"], positive, *r.get("neg", ()))], max_tokens
        )
    )
    for record, positive in flat:
        fields = [next(encoded) for _ in range(2 + len(record.get("neg", ())))]
        yield fields, record.get("score", math.nan), _group(record.get("group", positive))


def _encode_sts(tokenizer, batch, max_tokens):
    encoded = tokenizer.encode_texts([text for r in batch for text in (r["sentence1"], r["sentence2"])], max_tokens)
    for record, first, second in zip(batch, encoded[::2], encoded[1::2]):
        yield [first, second], record["score"], 0


_ENCODE = {"text": _encode_text, "instruction": _encode_instructions, "pairs": _encode_pairs, "sts": _encode_sts}
