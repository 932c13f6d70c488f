"""Answers of a chat model with reasoning and without: are they right, and in the mode asked for?"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

from smol.errors import UserError
from smol.evaluation.graders import GRADERS
from smol.evaluation.intervals import Estimate, proportion, ratio
from smol.evaluation.language_model import LanguageModel
from smol.evaluation.tasks import Record, Task
from smol.generation import Completion, Sampling
from smol.generation.chat import split_reasoning

OTHER = {"think": "no_think", "no_think": "think"}
TURNS = 3  # of a conversation in which the mode changes
DATE = "2025-07-01"  # for templates that ask for one: results should not depend on the day
Chat = list[Mapping[str, str]]


def in_mode(text: str, mode: str) -> bool:
    """Whether an answer has reasoning that ends, as ``think`` asks for, or has none."""
    reasoning, answer = split_reasoning(text)
    return bool(reasoning and answer) if mode == "think" else reasoning is None


def check_template(task: Task, model: LanguageModel) -> None:
    """See that a model knows how chats are written.

    Raises:
        UserError: If it has no chat template.
    """
    if model.template is None:
        raise UserError(
            f"{model.name} has no chat template, which task {task.name} needs; expected a model "
            "that was fine-tuned on conversations, or a task of another kind"
        )


def measure_chat(
    task: Task, model: LanguageModel, records: Sequence[Record], modes: Sequence[str]
) -> dict[str, Estimate]:
    """Ask each question in each mode, and then some with a change of mode in the third turn.

    In the conversations with a change the model answers two questions in the other mode; the third
    one ends with ``/think`` or ``/no_think``. What it answered stays in the conversation.

    Returns:
        For each mode, with the mode's name and a stroke before: ``accuracy`` and, where the task
        groups its records, ``accuracy/GROUP``; ``in_mode``, the share of answers in the mode asked
        for; ``in_mode_after_switch``, the same in third turns; ``ended``, the share that ended by
        themselves; ``answer_tokens``, mean length, reasoning included; ``tokens_per_second``, of
        all answers over the time that writing them took, ``model.batch_size`` at once.

    Raises:
        UserError: If the model has no chat template.
    """
    check_template(task, model)
    metrics: dict[str, dict[str, Estimate]] = {mode: {} for mode in (*modes, *OTHER)}
    chats = [[_user(task.question(record))] for record in records]
    for mode in modes:
        began = time.perf_counter()
        answers = _answer(task, model, chats, mode)
        seconds = time.perf_counter() - began
        tokens = [len(answer.tokens) for answer in answers]
        metrics[mode] |= {
            **_accuracies(task, records, answers),
            "in_mode": proportion([in_mode(answer.text, mode) for answer in answers]),
            "ended": proportion([answer.finish_reason == "stop" for answer in answers]),
            "answer_tokens": ratio(tokens),
            "tokens_per_second": Estimate(sum(tokens) / seconds, None, None, len(tokens)),
        }
        if task.kind == "chat" and (last := _after_switch(task, model, chats, answers, mode)):
            asked = OTHER[mode]
            shares = proportion([in_mode(answer.text, asked) for answer in last])
            metrics[asked]["in_mode_after_switch"] = shares
    return {f"{mode}/{name}": e for mode, found in metrics.items() for name, e in found.items()}


def _after_switch(
    task: Task,
    model: LanguageModel,
    chats: Sequence[Chat],
    answers: Sequence[Completion],
    mode: str,
) -> list[Completion]:
    """The third answers of conversations that begin in a mode and then ask for the other one."""
    threes = range(0, len(chats) - TURNS + 1, TURNS)
    talks: list[Chat] = [[*chats[i], _assistant(answers[i]), *chats[i + 1]] for i in threes]
    if not talks:
        return []
    for talk, answer, i in zip(talks, _answer(task, model, talks, mode), threes, strict=True):
        question = chats[i + 2][0]["content"]
        talk += [_assistant(answer), _user(f"{question} /{OTHER[mode]}")]
    return _answer(task, model, talks, mode)


def _answer(task: Task, model: LanguageModel, chats: Sequence[Chat], mode: str) -> list[Completion]:
    """Let the model write the next turn of each chat, greedily."""
    template = model.template
    date = DATE if "strftime_now" in template.source else None
    prompts = [
        template.encode(chat, mode=mode, date=date, add_generation_prompt=True).tokens.tolist()
        for chat in chats
    ]
    sampling = Sampling(
        temperature=0.0, max_new_tokens=task.max_new_tokens, stop_ids=(template.stop_id,)
    )
    return model.generate(prompts, sampling)


def _accuracies(
    task: Task, records: Sequence[Record], answers: Sequence[Completion]
) -> dict[str, Estimate]:
    """Of all answers, and of those to the records of each group."""
    grade, groups = GRADERS[task.metric], defaultdict(list)
    for record, answer in zip(records, answers, strict=True):
        hit = grade(split_reasoning(answer.text)[1], task.evaluate("answer", record))
        for group in task.groups(record):
            groups[f"accuracy/{group}"].append(hit)
        groups["accuracy"].append(hit)
    return {name: proportion(groups[name]) for name in sorted(groups)}


def _user(text: str) -> Mapping[str, str]:
    return {"role": "user", "content": text}


def _assistant(answer: "Completion") -> Mapping[str, str]:
    return {"role": "assistant", "content": answer.text.strip()}
