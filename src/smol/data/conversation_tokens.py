"""From records to documents: conversations as tokens, checked on the way."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from smol.data.chat import MODES, ChatTemplate, Message, Rendered
from smol.data.packing import pieces
from smol.data.prepare import split_of
from smol.data.records import Records
from smol.errors import UserError, nearest

CHECKED = 64  # conversations of a set of which every turn is rendered once more
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}  # other names in use
FLAGS = {"/think", "/no_think", "/system_override"}
REASONING = re.compile(r"<think>\s*\S.*?</think>", re.DOTALL)


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


@dataclass(frozen=True)
class Rendering:
    """How conversations become documents.

    Attributes:
        template: The chat template.
        context: Tokens of a document at most.
        train_on: ``assistant``, or ``all`` tokens.
        long: What becomes of longer ones: ``drop`` or ``split``.
        date: Today, as ``2025-07-01``, for the template.
        bare: Without the block of metadata.
    """

    template: ChatTemplate
    context: int
    train_on: str = "assistant"
    long: str = "drop"
    date: str | None = None
    bare: bool = False

    def settings(self) -> dict[str, Any]:
        """All that shapes the documents; JSON-compatible."""
        names = ("context", "train_on", "long", "date", "bare")
        own = {name: getattr(self, name) for name in names}
        template = {"template": self.template.source, "tokenizer": self.template.tokenizer.digest}
        return own | template


@dataclass(frozen=True)
class Conversation:
    """A conversation and how it is to be rendered.

    Attributes:
        where: Words that name its place.
        messages: The turns.
        mode: ``think`` or ``no_think``.
        variables: Others of the template.
        strict: Whether it must be answered in this mode.
    """

    where: str
    messages: list[Message]
    mode: str
    variables: dict[str, Any] = field(default_factory=dict)
    strict: bool = False

    @property
    def system(self) -> str:
        """What the system message says, without flags."""
        first = self.messages[0]
        words = first["content"].split() if first["role"] == "system" else []
        return " ".join(word for word in words if word not in FLAGS)


def read_conversations(config: SubsetConfig, held_out: bool) -> Iterator[Conversation]:
    """Yield the conversations of one side of a set.

    Raises:
        UserError: a record is not a conversation.
    """
    if held_out and config.held_out == 0:
        return
    own_set = isinstance(config.held_out, str)
    for where, record in Records(config.held_out if own_set and held_out else config.path):
        messages, variables = read_messages(record, config, where)
        if not own_set and config.held_out:
            digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).digest()
            if (split_of(digest, config.held_out) == "held_out") != held_out:
                continue
        thinking = variables.pop("enable_thinking", None)
        strict = config.mode != "data"
        if strict:
            mode = config.mode
        else:
            first = next(m for m in messages if m["role"] == "assistant")
            reasons = has_reasoning(first) if thinking is None else thinking
            mode = "think" if reasons else "no_think"
        yield Conversation(where, messages, mode, variables, strict)


def read_messages(
    record: Mapping[str, Any], config: SubsetConfig, where: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages of a record, and the variables it gives to the template.

    Raises:
        UserError: a column is missing, a message has no role, or the assistant has no turn.
    """
    if config.prompt:
        names = {"user": config.prompt, "assistant": config.response}
        messages = [{"role": r, "content": read_column(record, c, where)} for r, c in names.items()]
    else:
        messages = [_message(m, where) for m in read_column(record, config.messages, where)]
    variables = {k: v for k, v in (record.get("chat_template_kwargs") or {}).items() if v}
    if "enable_thinking" in (record.get("chat_template_kwargs") or {}):
        variables["enable_thinking"] = record["chat_template_kwargs"]["enable_thinking"]
    system = variables.pop("custom_instructions", None)
    if config.system:
        system = read_column(record, config.system, where) or system
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if config.tools and (tools := read_column(record, config.tools, where)):
        variables["tools"] = json.loads(tools) if isinstance(tools, str) else tools
    if not any(m["role"] == "assistant" for m in messages):
        raise UserError(
            f"{where} has no turn of the assistant, so there is nothing to train on; remove it"
        )
    return messages, variables


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


def has_reasoning(message: Message) -> bool:
    """Whether an answer holds reasoning."""
    given = message.get("reasoning_content") or ""
    return bool(given.strip() or REASONING.search(message.get("content") or ""))


def documents(
    config: SubsetConfig, rendering: Rendering, held_out: bool, notes: dict[str, Any]
) -> Iterator[list[Rendered]]:
    """Yield one document for each conversation of a set, or for each piece of a long one.

    Args:
        config: The set.
        rendering: How conversations become documents.
        held_out: Which side of the set.
        notes: Receives ``modes`` (per mode the numbers of ``conversations``, ``tokens`` and
            ``targets``), ``dropped`` and ``split``, the numbers of conversations too long.

    Raises:
        UserError: a record is no conversation, or a check fails.
    """
    notes |= {"modes": {}, "dropped": 0, "split": 0}
    for number, conversation in enumerate(read_conversations(config, held_out)):
        document = encode(conversation, rendering)
        check(conversation, document, rendering, every_turn=number < CHECKED)
        whole = len(document.tokens)
        if rendering.train_on == "all":
            document = Rendered(document.tokens, np.ones(whole, bool))
        else:
            whole = int(document.trained.nonzero()[0][-1]) + 1  # what follows is of no use
        if whole > rendering.context:
            notes["dropped" if rendering.long == "drop" else "split"] += 1
            if rendering.long == "drop":
                continue
        counts = notes["modes"].setdefault(
            conversation.mode, {"conversations": 0, "tokens": 0, "targets": 0}
        )
        counts["conversations"] += 1
        for piece in pieces(whole, rendering.context):
            tokens, trained = document.tokens[piece], document.trained[piece]
            if trained[1:].any():
                counts["tokens"] += len(tokens)
                counts["targets"] += int(trained[1:].sum())
                yield [Rendered(tokens, trained)]


def encode(
    conversation: Conversation,
    rendering: Rendering,
    turns: int | None = None,
    prompt: bool = False,
) -> Rendered:
    """The tokens of a conversation, or of its first turns.

    Args:
        conversation: The conversation.
        rendering: How it becomes tokens.
        turns: How many turns; by default all.
        prompt: Whether to begin the next answer.

    Raises:
        UserError: the template refuses it.
    """
    options = _options(conversation, rendering) | {"add_generation_prompt": prompt}
    try:
        return rendering.template.encode(conversation.messages[:turns], **options)
    except UserError as error:
        raise UserError(f"{conversation.where}: {error}") from None


def _options(conversation: Conversation, rendering: Rendering) -> dict[str, Any]:
    options = {"mode": conversation.mode, "date": rendering.date, "bare": rendering.bare}
    return options | conversation.variables


def check(
    conversation: Conversation, document: Rendered, rendering: Rendering, every_turn: bool
) -> None:
    """Refuse what would be learnt wrongly.

    Args:
        conversation: The conversation.
        document: Its tokens.
        rendering: How they came about.
        every_turn: Also render it turn by turn, and look for its system message.

    Raises:
        UserError: an answer is not trained on to its end, or not in the mode that it must be in;
            what precedes an answer is not rendered as at inference; the system message was lost, or
            a variable is none of the template's.
    """
    where, template, tokens = conversation.where, rendering.template, document.tokens
    answers = [m for m in conversation.messages if m["role"] == "assistant"]
    ends = int((tokens[document.trained] == template.stop_id).sum())
    if ends != len(answers):
        raise UserError(
            f"{where}: {ends} of {len(answers)} answers are trained on to the token that ends "
            "them; the chat template must enclose answer and end in {% generation %}"
        )
    if unknown := conversation.variables.keys() - template.variables:
        raise UserError(
            f"{where}: chat_template_kwargs has {', '.join(sorted(unknown))}, which the chat "
            "template does not use; remove it, or name another template with data.chat_template"
        )
    reasons = any(map(has_reasoning, answers))
    if conversation.strict and reasons != MODES[conversation.mode]:
        seen = "an answer reasons" if reasons else "no answer reasons"
        raise UserError(f"{where}: {seen}, but the mode is {conversation.mode}; use mode: data")
    if not every_turn:
        return
    turns = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
    for turn, prompt in ((turn + after, not after) for turn in turns for after in (0, 1)):
        head = encode(conversation, rendering, turn, prompt).tokens
        if not np.array_equal(tokens[: len(head)], head):
            raise UserError(
                f"{where}: the chat template renders the first {turn} turns otherwise once others "
                "follow, so the model would be trained on what it never sees"
            )
    system = conversation.system
    text = template.render(conversation.messages, **_options(conversation, rendering))
    if system not in " ".join(text.split()):
        raise UserError(
            f"{where}: the system message '{system[:40]}' is lost in rendering; expected a chat "
            "template that keeps it"
        )


def check_subsets(subsets: Mapping[str, SubsetConfig]) -> None:
    """Refuse what no set can be.

    Raises:
        UserError: there is one.
    """
    known = (*MODES, "data")
    for name, config in subsets.items():
        if config.mode not in known:
            hint = nearest(config.mode, known)
            raise UserError(
                f"subset '{name}': mode is {config.mode!r}, expected {', '.join(known)}.{hint}"
            )
        if bool(config.prompt) != bool(config.response):
            raise UserError(f"subset '{name}': prompt and response are columns that go together")
        if config.weight < 0:
            raise UserError(f"subset '{name}': weight is {config.weight}, expected 0 or more")
        if not isinstance(config.held_out, str) and not 0 <= config.held_out < 1:
            raise UserError(
                f"subset '{name}': held_out is {config.held_out}, expected a share, 0 to below 1"
            )
