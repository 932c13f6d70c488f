"""A conversation with a model: what was said, in which mode, and the commands of a terminal."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from smol.data.chat import MODES, ChatTemplate, Message
from smol.data.tokenizer import Tokenizer
from smol.errors import UserError, nearest
from smol.generation.engine import Generator
from smol.generation.row import Completion
from smol.generation.sampling import Sampling
from smol.generation.text import overlap

BEGIN, END = "<think>", "</think>"
COMMANDS = {
    "/think": "reason before answering, from here on",
    "/no_think": "answer at once, from here on",
    "/system": "TEXT   begin anew with this system prompt; without TEXT, with none",
    "/reset": "begin anew",
    "/help": "this list",
    "/exit": "leave",
}


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: The answer without its reasoning.
        reasoning: What was thought before; ``None`` if nothing was.
        completion: All that was written, as it was written.
        seconds: How long it took.
    """

    text: str
    reasoning: str | None
    completion: Completion
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens by the time from the question to the end, reading included."""
        return len(self.completion.tokens) / self.seconds

    def as_dict(self, log_probs: bool = False) -> dict[str, Any]:
        """The answer for a program, ready for JSON."""
        whole = self.completion
        content = {
            "text": self.text,
            "reasoning": self.reasoning,
            "tokens": whole.tokens,
            "tokens_per_second": round(self.tokens_per_second, 2),
            "finish_reason": whole.finish_reason,
        }
        return content | ({"log_probs": whole.log_probs} if log_probs else {})


def split_reasoning(text: str, finished: bool = True) -> tuple[str | None, str]:
    """Take apart what a model has written so far.

    Args:
        text: Reasoning and answer.
        finished: Nothing follows. Otherwise the end is held back where it may be the beginning of a
            ``<think>`` or ``</think>``, so that both parts only grow with the text.

    Returns:
        What stands between ``<think>`` and ``</think>``, ``None`` if nothing does, and the answer.
        Before the end of the reasoning there is no answer.
    """
    text = text.strip()
    if not finished and BEGIN.startswith(text):
        return None, ""
    if not text.startswith(BEGIN):
        return None, text
    reasoning, end, answer = text.removeprefix(BEGIN).partition(END)
    if not finished and not end:
        reasoning = reasoning[: len(reasoning) - overlap(reasoning, END)]
    return reasoning.strip() or None, answer.strip()


def chat_prompt(
    template: ChatTemplate, messages: Sequence[Message], mode: str | None = None, **variables: Any
) -> tuple[list[int], str]:
    """The tokens that an answer continues.

    Args:
        template: Words the turns.
        messages: The turns.
        mode: ``think``, ``no_think``, or ``None`` for what the template does by itself.
        variables: Others of the template.

    Returns:
        The tokens, and what they have begun of the answer: ``<think>``, or nothing.

    Raises:
        UserError: The template refuses the messages.
    """
    # A template that asks for today's date gets it; that of a run has its date written in.
    day = date.today().isoformat() if "strftime_now" in template.source else None
    options = {"mode": mode, "date": day, "add_generation_prompt": True, **variables}
    text = template.render(messages, **options)
    opened = BEGIN if text.rstrip().endswith(BEGIN) else ""
    return template.encode(messages, **options).tokens.tolist(), opened


class Conversation:
    """Turns of a user and a model, with memory.

    Without a chat template each question is continued as plain text, and nothing is remembered.

    Args:
        generator: Writes.
        tokenizer: Reads.
        template: Words the turns; ``None`` for a model that was not trained on any.
        sampling: How answers are written; the template's stop token is added.
        begin: Tokens that a plain text begins with.
        system: The system prompt.
        mode: ``think``, ``no_think``, or ``None`` for what the template does by itself.

    Attributes:
        messages: The turns so far.
        reply: The last answer, as far as it was written.

    Raises:
        UserError: If a mode or a system prompt is asked for where there is no template, or the mode
            is unknown.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        sampling: Sampling,
        begin: Sequence[int] = (),
        system: str | None = None,
        mode: str | None = None,
    ) -> None:
        if mode is not None and mode not in MODES:
            raise UserError(f"mode is {mode!r}, expected think or no_think.")
        self.generator, self.tokenizer, self.template = generator, tokenizer, template
        if template is not None:
            stop_ids = (*sampling.stop_ids, template.stop_id)
            sampling = replace(sampling, stop_ids=stop_ids)
        self.sampling, self.begin = sampling, list(begin)
        self.system, self._wanted = system, mode
        self.reply: Reply | None = None
        if mode is not None:
            self._check_modes()
        if system is not None:
            self._check_template("a system prompt")
        self.reset()

    def reset(self) -> None:
        """Forget what was said, but neither the system prompt nor the mode."""
        self.mode = self._wanted
        self.messages: list[dict[str, str]] = []
        if self.system:
            self.messages.append({"role": "system", "content": self.system})
        self._flag: str | None = None  # to put at the end of the next question

    def set_mode(self, mode: str) -> None:
        """Think, or not, from the next answer on.

        Raises:
            UserError: The template knows no modes.
        """
        self._check_modes()
        self._wanted = mode
        if self._spoken and self._reads_flags():
            self._flag = f"/{mode}"  # the turns before stay as they were
        else:
            self.mode = mode

    def command(self, line: str) -> str:
        """Obey a command, and say what was done.

        Args:
            line: Begins with a name of :data:`COMMANDS`; ``/exit`` is up to the caller.

        Raises:
            UserError: There is no such command, or it cannot be obeyed.
        """
        name, _, argument = line.strip().partition(" ")
        match name:
            case "/think" | "/no_think":
                self.set_mode(name[1:])
                return f"{name} from here on"
            case "/system":
                self._check_template("a system prompt")
                self.system = argument.strip() or None
                self.reset()
                return "a new conversation" + (" with this system prompt" if self.system else "")
            case "/reset":
                self.reset()
                return "a new conversation"
            case "/help":
                return "\n".join(f"{key:<10} {text}" for key, text in COMMANDS.items())
        raise UserError(f"there is no command {name}; see /help.{nearest(name, COMMANDS)}")

    def ask(self, question: str) -> Iterator[str]:
        """Answer a question, piece by piece, reasoning included.

        The turn counts once the iteration has begun to give pieces, also if it is left early; what
        there is of the answer is in ``reply``.

        Raises:
            UserError: The conversation leaves no room for an answer.
        """
        started = time.perf_counter()
        turn = {"role": "user", "content": f"{question} {self._flag}" if self._flag else question}
        prompt, opened = self._prompt([*self.messages, turn], question)
        limit = self.generator.max_length
        if self._spoken and limit is not None and len(prompt) >= limit:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, which leaves no room for an answer; "
                f"expected fewer than {limit}. Type /reset to begin anew."
            )
        stream = self.generator.stream(prompt, self.sampling)
        self._flag = None
        if opened:  # the prompt begins the reasoning
            yield opened
        try:
            yield from stream
        finally:
            completion = stream.completion
            reasoning, text = split_reasoning(opened + completion.text)
            self.reply = Reply(text, reasoning, completion, time.perf_counter() - started)
            answer = {"role": "assistant", "content": text}
            if reasoning:
                answer["reasoning_content"] = reasoning
            if self.template is not None:
                self.messages += [turn, answer]

    def _prompt(self, messages: list[dict[str, str]], question: str) -> tuple[list[int], str]:
        if self.template is None:
            return self.begin + self.tokenizer.encode(question), ""
        return chat_prompt(self.template, messages, self.mode)

    @property
    def _spoken(self) -> bool:
        return any(message["role"] == "user" for message in self.messages)

    def _check_template(self, wish: str) -> None:
        if self.template is None:
            raise UserError(f"{wish} needs a chat template, and the model comes with none.")

    def _check_modes(self) -> None:
        self._check_template("a mode")
        if "enable_thinking" not in self.template.source:
            raise UserError("the model's chat template has no modes; expected enable_thinking.")

    def _reads_flags(self) -> bool:
        """Whether the template takes a flag at the end of a question for a change of mode."""
        ends = set()
        for mode in MODES:
            turn = {"role": "user", "content": f"? /{mode}"}
            text = self.template.render([turn], mode="think", add_generation_prompt=True)
            ends.add(text.rpartition(f"? /{mode}")[2])
        return len(ends) > 1
