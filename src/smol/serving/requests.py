"""Requests of OpenAI's interface: read, checked, and turned into a prompt and settings."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smol.data.chat import Message
from smol.errors import UserError, nearest, shown
from smol.evaluation.language_model import LanguageModel
from smol.generation.chat import chat_prompt
from smol.generation.sampling import Sampling

# Names of our settings by those of a request.
SETTINGS = {
    name: name for name in ("temperature", "top_k", "top_p", "min_p", "stop", "stop_ids", "seed")
}
SETTINGS |= {"repetition_penalty": "repetition_penalty", "max_tokens": "max_new_tokens"}
SETTINGS |= {"max_completion_tokens": "max_new_tokens", "stop_token_ids": "stop_ids"}
READ = {"messages", "prompt", "tools", "chat_template_kwargs", "stream", "stream_options"}
# About the request, not about the answer.
HARMLESS = {"model", "user", "metadata", "store", "service_tier", "safety_identifier"}
# What cannot be changed here, and the value under which nothing is to be changed.
NEUTRAL = {"n": 1, "best_of": 1, "echo": False, "suffix": "", "logprobs": False, "top_logprobs": 0}
NEUTRAL |= {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "tool_choice": "auto"}
NEUTRAL |= {"response_format": {"type": "text"}, "parallel_tool_calls": True}


@dataclass(frozen=True)
class Request:
    """What a client asks for.

    Attributes:
        prompt: Tokens.
        opened: What the prompt has begun of the answer: ``<think>``, or nothing.
        sampling: How it is continued.
        stream: Send the text in pieces.
        usage: Send the numbers of tokens behind them.
    """

    prompt: list[int]
    opened: str
    sampling: Sampling
    stream: bool
    usage: bool


def read_request(body: Any, model: LanguageModel, max_length: int, chat: bool) -> Request:
    """Read the JSON of a request.

    Args:
        body: The JSON.
        model: Its tokenizer and chat template.
        max_length: Tokens of prompt and text at most.
        chat: Whether messages are to be answered; otherwise a prompt is continued.

    Raises:
        UserError: If the request is not understood, or asks for what is not done here.
    """
    body = _expect({"the request": body}, "the request", dict, "a JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    for name, value in body.items():
        if name in NEUTRAL and value != NEUTRAL[name]:
            raise UserError(f"{name} is {shown(value)}, expected {NEUTRAL[name]!r}, or none.")
        if name not in (known := {*SETTINGS, *READ, *HARMLESS, *NEUTRAL}):
            raise UserError(f"{name} is not known here; leave it out.{nearest(name, known)}")
    # Where a request is silent, OpenAI's defaults.
    values = {"temperature": 1.0, "seed": time.time_ns() % 2**32}
    if chat:
        values["max_new_tokens"] = max_length
    values |= {SETTINGS[name]: value for name, value in body.items() if name in SETTINGS}
    sampling, opened = Sampling(**values), ""
    if not chat:
        prompt = _prompt(body, model)
    elif model.template is None:
        raise UserError("the model has no chat template; expected /v1/completions.")
    else:
        stop_ids = (*sampling.stop_ids, model.template.stop_id)
        sampling = Sampling(**values | {"stop_ids": stop_ids})
        tools = _expect(body, "tools", list, "a list", [])
        variables = _expect(body, "chat_template_kwargs", dict, "an object", {})
        messages = _messages(_expect(body, "messages", list, "a list of messages"))
        prompt, opened = chat_prompt(model.template, messages, tools=tools or None, **variables)
    stream = _expect(body, "stream", bool, "true or false", False)
    options = _expect(body, "stream_options", dict, "an object", {})
    return Request(prompt, opened, sampling, stream, bool(options.get("include_usage")))


def _expect(body: dict[str, Any], name: str, kind: type, what: str, default: Any = None) -> Any:
    value = body.get(name, default)
    if not isinstance(value, kind):
        raise UserError(f"{name} is {shown(value)}, expected {what}.")
    return value


def _prompt(body: dict[str, Any], model: LanguageModel) -> list[int]:
    prompt = _expect(body, "prompt", str | list, "a text, or a list of tokens")
    if isinstance(prompt, str):
        return [*model.begin, *model.tokenizer.encode(prompt)]
    if strangers := [token for token in prompt if type(token) is not int]:
        raise UserError(f"prompt holds {shown(strangers[0])}, expected tokens: whole numbers.")
    return prompt


def _messages(given: Sequence[Any]) -> list[Message]:
    """Messages as a template knows them: roles it has, and texts for contents."""
    if not given:
        raise UserError("messages is empty, expected at least one.")
    messages = []
    for number, message in enumerate(given, 1):
        place = f"message {number}"
        message = dict(_expect({place: message}, place, dict, "an object"))
        if not isinstance(message.get("role"), str):
            raise UserError(f"{place} has no role, expected system, user, assistant or tool.")
        if message["role"] == "developer":
            message["role"] = "system"
        content = message.get("content")
        if content is None and message["role"] in ("user", "tool"):
            raise UserError(f"{place} has no content, expected a text.")
        message["content"] = "" if content is None else _text(content, place)
        messages.append(message)
    return messages


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        good = isinstance(part, dict) and part.get("type") == "text"
        if not (good and isinstance(part.get("text"), str)):
            raise UserError(
                f"the content of {place} holds {shown(part)}, expected a text, or parts such as "
                '{"type": "text", "text": ...}.'
            )
    return "\n".join(part["text"] for part in parts)
