"""Messages of a conversation, from a record in any of the forms in use."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smol.data.chat import MODES
from smol.errors import UserError, nearest, one_line, shown

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}  # other names in use


@dataclass
class SubsetConfig:
    """One set of conversations.

    Attributes:
        path: A jsonl or parquet file, a glob, a folder, any fsspec URL, or
            ``hub:NAME@CONFIG/SPLIT``.
        weight: How much of it is read: 0.5 is half of the conversations, 2 each of them twice.
        mode: ``think``, ``no_think``, or ``data``: as the first answer of each conversation does,
            or its ``chat_template_kwargs`` say.
        held_out: Share kept from training by the hash of the conversation, or the path of a set of
            its own.
        messages: Column of the messages.
        prompt: Column of a question, together with ``response`` instead of ``messages``.
        response: Column of its answer.
        system: Column of a system message, for conversations without one.
        tools: Column of the functions that the model may call, a list or JSON.
        provenance: Where the set comes from; for people.
    """

    path: str
    weight: float = 1.0
    mode: str = "data"
    held_out: float | str = 0.0
    messages: str = "messages"
    prompt: str | None = None
    response: str | None = None
    system: str | None = None
    tools: str | None = None
    provenance: str | None = None


def read_messages(
    record: Mapping[str, Any], config: SubsetConfig, where: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages of a record, and the variables it gives to the template.

    Raises:
        UserError: a column is missing, a message has no role, or the assistant has no turn.
    """
    if config.prompt:
        names = {"user": config.prompt, "assistant": config.response}
        given = [{"role": r, "content": read_column(record, c, where)} for r, c in names.items()]
    else:
        given = read_column(record, config.messages, where)
        if not isinstance(given, list):
            raise UserError(f"{where}: the messages are {shown(given)}, expected a list of them")
    messages = [_message(m, where) for m in given]
    if not any(m["role"] == "assistant" for m in messages):
        raise UserError(
            f"{where} has no turn of the assistant, so there is nothing to train on; remove it"
        )
    arguments = record.get("chat_template_kwargs") or {}
    if not isinstance(arguments, Mapping):
        raise UserError(
            f"{where}: chat_template_kwargs is {shown(arguments)}, expected names with values"
        )
    variables = {k: v for k, v in arguments.items() if v or (k, v) == ("enable_thinking", False)}
    column = read_column(record, config.system, where) if config.system else None
    instructions = variables.pop("custom_instructions", None)
    if system := _system(messages, column, instructions, where):
        messages = [system, *messages[messages[0]["role"] == "system" :]]
    if config.tools and (tools := read_column(record, config.tools, where)):
        variables["tools"] = _tools(tools, config.tools, where)
    return messages, variables


def _system(
    messages: list[dict[str, Any]], column: Any, instructions: Any, where: str
) -> dict[str, Any] | None:
    """The system message: its own or the column's, and then the custom instructions."""
    first = messages[0]["content"] if messages[0]["role"] == "system" else column
    texts = [text for text in (first, instructions) if text]
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{where}: a system message is {shown(text)}, expected text")
    texts = list(dict.fromkeys(text.strip() for text in texts))
    flags = {word for text in texts for word in text.split()} & {f"/{mode}" for mode in MODES}
    if len(texts) == 2 and len(flags) == 2:
        raise UserError(
            f"{where}: the system message and the custom_instructions ask for different modes, "
            "/think and /no_think; remove one"
        )
    return {"role": "system", "content": "\n".join(texts)} if texts else None


def _tools(tools: Any, column: str, where: str) -> Any:
    try:
        return json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise UserError(
            f"{where}: column '{column}' is no JSON ({one_line(error)}): {shown(tools)}"
        ) from None


def read_column(record: Mapping[str, Any], name: str, where: str) -> Any:
    """A column of a record.

    Raises:
        UserError: the record has no such column.
    """
    if name not in record:
        known = ", ".join(map(repr, record)) or "none"
        raise UserError(
            f"{where} has no column '{name}', its columns are {known}; set the subset's messages, "
            f"or prompt and response.{nearest(name, record)}"
        )
    return record[name]


def _message(message: Any, where: str) -> dict[str, Any]:
    if isinstance(message, Mapping) and "from" in message:
        message = {"role": message["from"], "content": message.get("value")}
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UserError(f"{where}: a message is {str(message)[:60]!r}, expected role and content")
    made = {key: value for key, value in message.items() if value is not None}
    content = made.setdefault("content", "")
    if not isinstance(content, str):
        kind = type(content).__name__
        raise UserError(f"{where}: the content of a message is of type {kind}, expected text")
    return made | {"role": ROLES.get(made["role"], made["role"])}
