"""From records to pairs of answers as tokens, checked on the way."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from smol.data.chat import Rendered
from smol.data.conversation_tokens import (
    CHECKED,
    Conversation,
    Rendering,
    begins,
    check,
    encode,
    has_reasoning,
)
from smol.data.messages import SubsetConfig, is_held_out, read_column, read_messages
from smol.data.records import Records
from smol.errors import UserError, shown


@dataclass
class PairsConfig:
    """One set of preference pairs.

    A record has the columns ``prompt``, ``chosen`` and ``rejected``, each a text or a list of
    messages; or ``chosen`` and ``rejected`` alone, two conversations that begin alike.

    Attributes:
        path: A jsonl or parquet file, a glob, a folder, a URL, or ``hub:NAME@CONFIG/SPLIT``.
        weight: How much of it is read: 0.5 is half of the pairs, 2 each of them twice.
        mode: ``think``, ``no_think``, or ``data``: as the first answer of the chosen conversation
            does, or the ``chat_template_kwargs`` of the record say.
        held_out: Share kept from training by the hash of the prompt, or the path of a set of its
            own.
        prompt: Column of the prompt.
        chosen: Column of the preferred answer.
        rejected: Column of the other answer.
        system: Column of a system message, for prompts without one.
        tools: Column of the functions that the model may call, a list or JSON.
        provenance: Where the set comes from; for people.
    """

    path: str
    weight: float = 1.0
    mode: str = "data"
    held_out: float | str = 0.0
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    system: str | None = None
    tools: str | None = None
    provenance: str | None = None


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt.

    Attributes:
        chosen: The prompt with the preferred answer.
        rejected: The prompt with the other one.
        turns: How many messages are the prompt.
    """

    chosen: Conversation
    rejected: Conversation
    turns: int

    @property
    def prompt(self) -> Conversation:
        """The messages that both have."""
        return replace(self.chosen, messages=self.chosen.messages[: self.turns])

    @property
    def same(self) -> bool:
        """Whether there is nothing to prefer."""
        return self.chosen.messages == self.rejected.messages


def read_pairs(config: PairsConfig, held_out: bool) -> Iterator[Pair]:
    """Yield the pairs of one side of a set.

    Raises:
        UserError: a record is not a pair.
    """
    if held_out and config.held_out == 0:
        return
    own_set = isinstance(config.held_out, str)
    for where, record in Records(config.held_out if own_set and held_out else config.path):
        pair = _pair(record, config, where)
        asked = pair.prompt.messages
        if not own_set and config.held_out and is_held_out(asked, config.held_out) != held_out:
            continue
        yield pair


def _pair(record: Mapping[str, Any], config: PairsConfig, where: str) -> Pair:
    columns = SubsetConfig(config.path, system=config.system, tools=config.tools)
    sides = []
    for column in (config.chosen, config.rejected):
        messages = _conversation(record, column, config.prompt, where)
        sides.append(read_messages({**record, "messages": messages}, columns, where))
    (chosen, variables), (rejected, _) = sides
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    turns = min(sum(1 for _ in alike), len(chosen) - 1, len(rejected) - 1)
    if not turns or {chosen[turns]["role"], rejected[turns]["role"]} != {"assistant"}:
        raise UserError(
            f"{where}: chosen and rejected are not two answers of the assistant to one prompt; "
            "expected a prompt, or two conversations that differ from an answer on"
        )
    thinking = variables.pop("enable_thinking", None)
    mode = config.mode
    if mode == "data":
        first = next(message for message in chosen if message["role"] == "assistant")
        mode = "think" if (has_reasoning(first) if thinking is None else thinking) else "no_think"
    strict = config.mode != "data"
    return Pair(
        Conversation(where, chosen, mode, variables, strict),
        # May reason or not: that may be why it was rejected.
        Conversation(where, rejected, mode, variables),
        turns,
    )


def _conversation(record: Mapping[str, Any], column: str, prompt: str, where: str) -> list[Any]:
    """The messages of a prompt and an answer, which may be one list already."""
    answer = read_column(record, column, where)
    messages = _as_messages(answer, "assistant", column, where)
    first = messages[0]
    if isinstance(first, Mapping) and first.get("role", first.get("from")) not in (
        "assistant",
        "gpt",
        "model",
    ):
        return messages
    return _as_messages(read_column(record, prompt, where), "user", prompt, where) + messages


def _as_messages(value: Any, role: str, column: str, where: str) -> list[Any]:
    if isinstance(value, str) and value.strip():
        return [{"role": role, "content": value}]
    if isinstance(value, list) and value:
        return value
    raise UserError(
        f"{where}: column '{column}' is {shown(value)}, expected a text or a list of messages"
    )


def documents(
    config: PairsConfig, rendering: Rendering, held_out: bool, notes: dict[str, Any]
) -> Iterator[list[Rendered]]:
    """Yield two documents for each pair of a set, the chosen answer first.

    Trained on is the answer alone, with the token that ends it.

    Args:
        config: The set.
        rendering: How conversations become documents; what becomes of longer ones is ``drop``, with
            their pair, or ``cut`` at the end.
        held_out: Which side of the set.
        notes: Receives ``modes`` (per mode the numbers of ``pairs`` and of the tokens of their
            ``chosen`` and ``rejected`` answers), and how many pairs were ``dropped`` or ``cut`` for
            their length, or left out because both answers are the ``same``, or the rejected one is
            ``unasked``: it does not follow the generation prompt of the mode.

    Raises:
        UserError: a record is no pair, a check fails, or nothing is left to train on.
    """
    notes |= {"modes": {}, "dropped": 0, "cut": 0, "same": 0, "unasked": 0}
    longest = 0
    for number, pair in enumerate(read_pairs(config, held_out)):
        if pair.same:
            notes["same"] += 1
            continue
        item = encode_pair(pair, rendering, every_turn=number < CHECKED)
        if item is None:
            notes["unasked"] += 1
            continue
        whole = max(len(document.tokens) for document in item)
        longest = max(longest, whole)
        if whole > rendering.context:
            end = slice(rendering.context)
            item = [Rendered(d.tokens[end], d.trained[end]) for d in item]
            cut = rendering.long == "cut" and all(d.trained.any() for d in item)
            notes["cut" if cut else "dropped"] += 1
            if not cut:
                continue
        counts = notes["modes"].setdefault(
            pair.chosen.mode, {"pairs": 0, "chosen": 0, "rejected": 0}
        )
        counts["pairs"] += 1
        for name, document in zip(("chosen", "rejected"), item, strict=True):
            counts[name] += int(document.trained.sum())
        yield item
    if held_out or notes["modes"] or not (reasons := left_out(notes, rendering.context)):
        return
    remedy = "; the pairs need other answers"
    if notes["dropped"]:
        remedy = f"; type --data.max_length {longest} --data.context_length {2 * longest}"
    raise UserError(f"{config.path}: no pair is left to train on: {', '.join(reasons)}{remedy}")


def left_out(notes: Mapping[str, Any], max_length: int) -> list[str]:
    """How many pairs of a set are not read, and why."""
    reasons = {
        "dropped": f"longer than {max_length} tokens",
        "same": "with two answers that are the same",
        "unasked": "with a rejected answer in another mode than the prompt",
    }
    return [f"{notes[key]:,} {reason}" for key, reason in reasons.items() if notes[key]]


def encode_pair(pair: Pair, rendering: Rendering, every_turn: bool) -> list[Rendered] | None:
    """The tokens of both answers after their prompt.

    ``None`` if the rejected one does not follow what a model is given: in mode ``no_think``, one
    that reasons stands in the place of the empty block that the generation prompt supplies.

    Args:
        pair: The pair.
        rendering: How conversations become documents.
        every_turn: Also check the chosen conversation turn by turn.

    Raises:
        UserError: a check fails.
    """
    question = encode(pair.prompt, rendering).tokens
    prompt = encode(pair.prompt, rendering, prompt=True).tokens
    item = []
    for side in (pair.chosen, pair.rejected):
        document = encode(side, rendering)
        follows = begins(document.tokens, prompt)
        if side is pair.rejected and begins(document.tokens, question) and not follows:
            return None
        check(side, document, rendering, every_turn=every_turn and side is pair.chosen)
        if not follows:
            raise UserError(
                f"{side.where}: the chat template renders the prompt otherwise once an answer "
                "follows, so the model would be trained on what it never sees"
            )
        trained = document.trained.copy()
        trained[: len(prompt)] = False  # earlier answers
        end = int(trained.nonzero()[0][-1]) + 1  # what follows is of no use
        item.append(Rendered(document.tokens[:end], trained[:end]))
    return item
