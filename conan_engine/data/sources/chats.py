"""Conversations: OpenAI's messages, ShareGPT's conversations, TRL's prompt and completion, Alpaca's history."""

from __future__ import annotations

from typing import Any

from conan_engine.data.sources.bad import Bad, wrong

# the names of speakers -> system, user, assistant, tool
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}


def of_row(row: dict[str, Any]) -> tuple[str, dict] | None:
    """(kind, record) of a row that is a conversation in parts: TRL's prompt and completion, or Alpaca's with a
    history.

    None for any other row. Raises Bad.
    """
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return "instruction", {"instruction": "", "input": prompt, "output": completion}
        return "chat", {
            "messages": _answered(turns(prompt, "'prompt'", learn=False) + turns(completion, "'completion'"))
        }
    if "history" in row and {"instruction", "output"} <= row.keys():
        messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        for turn in row["history"] if isinstance(row["history"], list) else [row["history"]]:
            if not isinstance(turn, list) or len(turn) != 2:
                raise wrong(turn, "'history'", "list of pairs of question and answer")
            messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        messages += [
            {"role": "user", "content": "\n".join(filter(None, (row["instruction"], row.get("input"))))},
            {"role": "assistant", "content": row["output"]},
        ]
        return "chat", {"messages": turns(messages, "'history'")}
    return None


def conversation(value: Any, place: str) -> list[dict]:
    """A list of messages as `turns` gives it, with something to learn in it. Raises Bad."""
    return _answered(turns(value, place))


def turns(value: Any, place: str, learn: bool = True) -> list[dict]:
    """Messages as dicts with role, content (text), whether they are learned, and their other keys. Raises Bad.

    value: a list of messages, {"role" or "from", "content" or "value"}, or one text of a user.
    """
    if isinstance(value, str):
        value = [{"role": "user" if not learn else "assistant", "content": value}]
    if not isinstance(value, list) or not value:
        raise wrong(value, place, "list of messages")
    return [_turn(message, place, learn) for message in value]


def _turn(message, place, learn):
    if not isinstance(message, dict):
        raise wrong(message, place, 'list of messages such as {"role": "user", "content": "..."}')
    message = {key: value for key, value in message.items() if value is not None}
    said = message.pop("role", None) or message.pop("from", None)
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise Bad("unknown role", f"{place} has a message of role {said!r}; expected one of {', '.join(ROLES)}")
    content = message.pop("content", message.pop("value", ""))
    if isinstance(content, list):  # a content of several parts
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise wrong(content, place, "text, as content of a message")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise wrong(content, place, "text, as content of a message")
    learn = learn and role == "assistant" and bool(content.strip()) and message.pop("weight", 1) != 0
    return {**message, "role": role, "content": content, "learn": learn}


def _answered(messages):
    if not any(message["learn"] for message in messages):
        raise Bad("no answer", "the conversation has no turn of an assistant to learn; add one or leave it out")
    return messages


def text(value: Any, place: str) -> str:
    """What a list of messages says, one after another: ms-swift's form of a text to embed. Raises Bad."""
    return "\n".join(message["content"] for message in turns(value, place))
