"""Messages of a conversation, from a record in any of the forms in use."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smol.data.chat import MODES, Message
from smol.data.prepare import split_of
from smol.errors import UserError, nearest, one_line, shown

INSTRUCTIONS = "custom_instructions"  # of a record, or of its chat_template_kwargs
OWN = {"messages", "mode", "add_generation_prompt"}  # arguments that are not a record's to give
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

    Custom instructions, of the record or of its ``chat_template_kwargs``, join the system message.

    Raises:
        UserError: a column is missing, a value is of the wrong type, a message has no role, the
            assistant has no turn, or an answer is empty.
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
    if any(m["role"] == "assistant" and _is_empty(m) for m in messages):
        raise UserError(
            f"{where} has an answer with nothing in it, so a model would learn to end at once; "
            "remove it"
        )
    variables = _variables(record.get("chat_template_kwargs") or {}, where)
    column = read_column(record, config.system, where) if config.system else None
    first = messages[0]["content"] if messages[0]["role"] == "system" else column
    texts = (first, record.get(INSTRUCTIONS), variables.pop(INSTRUCTIONS, None))
    if system := _system(texts, where):
        messages = [system, *messages[messages[0]["role"] == "system" :]]
    if config.tools and (tools := read_column(record, config.tools, where)):
        variables["tools"] = _tools(tools, f"column '{config.tools}'", where)
    return messages, variables


def is_held_out(messages: Sequence[Message], share: float) -> bool:
    """Whether a conversation is on the held-out side, by the hash of its messages."""
    text = json.dumps(messages, sort_keys=True, default=str)
    return split_of(hashlib.sha256(text.encode()).digest(), share) == "held_out"


def _variables(arguments: Any, where: str) -> dict[str, Any]:
    """What ``chat_template_kwargs`` gives to the template; what is empty there is left out."""
    if not isinstance(arguments, Mapping):
        raise UserError(
            f"{where}: chat_template_kwargs is {shown(arguments)}, expected names with values"
        )
    if taken := OWN & arguments.keys():
        raise UserError(
            f"{where}: chat_template_kwargs has {', '.join(sorted(taken))}, which it cannot set; "
            "remove it (the mode is enable_thinking, true or false)"
        )
    thinking = arguments.get("enable_thinking")
    if thinking not in (None, True, False):
        raise UserError(f"{where}: enable_thinking is {shown(thinking)}, expected true or false")
    variables = {key: value for key, value in arguments.items() if value}
    for name in ("tools", "xml_tools", "python_tools"):
        if name in variables and not (name == "python_tools" and isinstance(variables[name], str)):
            variables[name] = _tools(variables[name], name, where)
    return variables if thinking is None else variables | {"enable_thinking": bool(thinking)}


def _system(given: Sequence[Any], where: str) -> dict[str, Any] | None:
    """The system message, of texts of which each may be empty or said before."""
    texts = [text for text in given if text]
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{where}: a system message is {shown(text)}, expected text")
    texts = list(dict.fromkeys(text.strip() for text in texts))
    flags = {word for text in texts for word in text.split()} & {f"/{mode}" for mode in MODES}
    if len(texts) > 1 and len(flags) > 1:
        raise UserError(
            f"{where}: the system message and the custom_instructions ask for different modes, "
            "/think and /no_think; remove one"
        )
    return {"role": "system", "content": "\n".join(texts)} if texts else None


def _tools(tools: Any, name: str, where: str) -> list[Any]:
    tools = _parsed(tools, name, where)
    if not isinstance(tools, list) or not all(isinstance(t, str | Mapping) for t in tools):
        raise UserError(f"{where}: {name} is {shown(tools)}, expected a list of functions")
    return tools


def _parsed(value: Any, name: str, where: str) -> Any:
    """A value, which may be given as JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise UserError(f"{where}: {name} is no JSON ({one_line(error)}): {shown(value)}") from None


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
    made = {"content": ""} | {key: value for key, value in message.items() if value is not None}
    for key in ("content", "reasoning_content"):
        if not isinstance(made.get(key, ""), str):
            kind = type(made[key]).__name__
            raise UserError(f"{where}: the {key} of a message is of type {kind}, expected text")
    if "tool_calls" in made:
        made["tool_calls"] = _calls(made["tool_calls"], where)
    return made | {"role": ROLES.get(made["role"], made["role"])}


def _is_empty(answer: Message) -> bool:
    parts = (answer["content"], answer.get("reasoning_content", ""))
    return not (any(part.strip() for part in parts) or answer.get("tool_calls"))


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls of functions, each with a name; what is given as JSON is parsed."""
    calls = _parsed(calls or [], "tool_calls", where)
    made = [_parsed(c, "a tool call", where) for c in calls] if isinstance(calls, list) else [calls]
    for call in made:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(
                f"{where}: a tool call is {shown(call)}, expected a function with name and "
                "arguments"
            )
    return made
