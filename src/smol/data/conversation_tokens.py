"""From records to documents: conversations as tokens, checked on the way."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from smol.data.chat import MODES, ChatTemplate, Message, Rendered
from smol.data.messages import SubsetConfig, is_held_out, read_messages
from smol.data.packing import pieces
from smol.data.records import Records
from smol.errors import UserError, nearest

FORMAT = 3  # of the documents; part of the name they are kept under
CHECKED = 64  # conversations of a set of which every turn is tokenised once more
FLAGS = {"/think", "/no_think", "/system_override"}
REASONING = re.compile(r"<think>\s*\S.*?</think>", re.DOTALL)


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
        return own | template | {"format": FORMAT}


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
        if not own_set and config.held_out and is_held_out(messages, config.held_out) != held_out:
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
        notes: Receives ``modes`` (of the tokens trained on, how many are predicted in or before an
            answer in each mode), ``dropped`` and ``split``, the numbers of conversations too long.

    Raises:
        UserError: a record is no conversation, a check fails, or all that is to be trained on is
            too long.
    """
    notes |= {"modes": {}, "dropped": 0, "split": 0}
    kept = longest = 0
    for number, conversation in enumerate(read_conversations(config, held_out)):
        document = encode(conversation, rendering)
        modes = check(conversation, document, rendering, every_turn=number < CHECKED)
        ends = document.trained & (document.tokens == rendering.template.stop_id)
        answer = np.minimum(np.cumsum(ends) - ends, len(modes) - 1)  # which a token belongs to
        whole = len(document.tokens)
        if rendering.train_on == "all":
            document = Rendered(document.tokens, np.ones(whole, bool))
        else:
            whole = int(document.trained.nonzero()[0][-1]) + 1  # what follows is of no use
        longest = max(longest, whole)
        if whole > rendering.context:
            notes["dropped" if rendering.long == "drop" else "split"] += 1
            if rendering.long == "drop":
                continue
        kept += 1
        for piece in pieces(whole, rendering.context):
            tokens, trained = document.tokens[piece], document.trained[piece]
            if trained[1:].any():
                targets = np.bincount(answer[piece][1:][trained[1:]], minlength=len(modes))
                for mode, count in zip(modes, targets.tolist(), strict=True):
                    notes["modes"][mode] = notes["modes"].get(mode, 0) + count
                yield [Rendered(tokens, trained)]
    if notes["dropped"] and not kept and not held_out:
        raise UserError(
            f"{config.path}: all {notes['dropped']:,} conversations are longer than a row of "
            f"{rendering.context:,} tokens; type --data.context_length {longest} to keep them all, "
            "or --data.long split"
        )


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
) -> list[str]:
    """Refuse what would be learnt wrongly.

    Args:
        conversation: The conversation.
        document: Its tokens.
        rendering: How they came about.
        every_turn: Also render it turn by turn, and look for its system message; done anyway
            where an answer does not follow the generation prompt of the conversation's mode.

    Returns:
        The mode of each answer.

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
    turns = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
    every_turn = every_turn or not _in_one_mode(conversation, document, template)
    modes = []
    for number, turn in enumerate(turns, 1):
        mode = conversation.mode
        if every_turn:
            prompt = encode(conversation, rendering, turn, prompt=True).tokens
            mode = _mode(prompt, mode, template)
        modes.append(mode)
        reasons = has_reasoning(conversation.messages[turn])
        seen = f"answer {number} {'reasons' if reasons else 'does not reason'}"
        if conversation.strict and reasons != MODES[mode]:
            raise UserError(f"{where}: {seen}, but the mode is {mode}; use mode: data")
        if not every_turn:
            continue
        if not begins(tokens, prompt) and begins(
            tokens, encode(conversation, rendering, turn).tokens
        ):
            raise UserError(
                f"{where}: the mode changes without a flag: {seen}, but the mode there is {mode}; "
                f"end the question with /{'think' if reasons else 'no_think'}, or remove it"
            )
        until = encode(conversation, rendering, turn + 1).tokens
        if not (begins(tokens, prompt) and begins(tokens, until)):
            raise UserError(
                f"{where}: the chat template renders the first {turn + begins(tokens, prompt)} "
                "turns otherwise once others follow, so the model would be trained on what it "
                "never sees"
            )
    if not every_turn:
        return modes
    system = conversation.system
    text = template.render(conversation.messages, **_options(conversation, rendering))
    if system not in " ".join(text.split()):
        raise UserError(
            f"{where}: the system message '{system[:40]}' is lost in rendering; expected a chat "
            "template that keeps it"
        )
    return modes


def _in_one_mode(conversation: Conversation, document: Rendered, template: ChatTemplate) -> bool:
    """Whether no flag changes the mode, and each answer follows the generation prompt in it."""
    users = (m["content"].split()[-1:] for m in conversation.messages if m["role"] == "user")
    if any(FLAGS.intersection(last) for last in users):
        return False
    opening = template.openings[conversation.mode]
    starts = np.flatnonzero(document.trained[1:] & ~document.trained[:-1]) + 1
    return all(
        np.array_equal(document.tokens[max(0, start - len(opening)) : start], opening)
        for start in starts
    )


def _mode(prompt: np.ndarray, default: str, template: ChatTemplate) -> str:
    """The mode that a generation prompt asks for, which flags in messages may have changed."""
    openings = template.openings
    by_default = sorted(MODES, key=lambda mode: mode != default)
    found = (m for m in by_default if np.array_equal(prompt[-len(openings[m]) :], openings[m]))
    return next(found, default)


def begins(tokens: np.ndarray, head: np.ndarray) -> bool:
    """Whether tokens begin with others."""
    return np.array_equal(tokens[: len(head)], head)


def check_subsets(subsets: Mapping[str, SubsetConfig]) -> None:
    """Refuse what no set can be.

    Raises:
        UserError: there is one.
    """
    known = (*MODES, "data")
    for name, config in subsets.items():
        for key in ("path", "weight", "mode", "held_out"):
            if getattr(config, key) is None:
                raise UserError(f"subset '{name}': {key} is null, expected a value")
        if config.mode not in known:
            hint = nearest(config.mode, known)
            raise UserError(
                f"subset '{name}': mode is {config.mode!r}, expected {', '.join(known)}.{hint}"
            )
        if bool(config.prompt) != bool(config.response):
            raise UserError(f"subset '{name}': prompt and response are columns that go together")
        if not 0 <= config.weight < math.inf:
            raise UserError(f"subset '{name}': weight is {config.weight}, expected 0 or more")
        if not isinstance(config.held_out, str) and not 0 <= config.held_out < 1:
            raise UserError(
                f"subset '{name}': held_out is {config.held_out}, expected a share, 0 to below 1"
            )
