"""Measuring a model on a task, kind by kind."""

import math
from collections.abc import Sequence
from dataclasses import replace

from smol.errors import UserError, nearest, shown
from smol.evaluation.chats import OTHER, check_template, measure_chat
from smol.evaluation.graders import GRADERS
from smol.evaluation.intervals import Estimate, proportion, ratio
from smol.evaluation.language_model import LanguageModel
from smol.evaluation.likelihood import Score, check_requests
from smol.evaluation.tasks import Record, Task
from smol.generation import Sampling

Metrics = dict[str, Estimate]


def measure(
    task: Task, model: LanguageModel, limit: int | None = None, modes: Sequence[str] = ()
) -> Metrics:
    """Ask a model the questions of a task.

    Args:
        task: The task.
        model: The model.
        limit: At most so many records, where that is fewer than the task's own limit.
        modes: ``think``, ``no_think`` or both, for a ``chat`` task, which by default tries both,
            and for a ``generative`` one, which by default continues its prompt as plain text.

    Returns:
        Metrics by name. Of choices: ``accuracy``; ``accuracy_per_byte``, by log-likelihood over
        the bytes of the choice; ``accuracy_centred``, ``(accuracy - chance) / (1 - chance)``, which
        is 0 for a guess; ``bits_per_byte`` of the right choice, which moves before accuracies do.
        Of written answers: ``accuracy``, see :mod:`smol.evaluation.chats` for those in chats.

    Raises:
        UserError: If the records cannot be read or do not fit the task, or the model does not.
    """
    task, records = _prepared(task, limit)
    if task.kind == "chat" or (task.kind == "generative" and modes):
        return measure_chat(task, model, records, modes or ("no_think", "think"))
    if task.kind == "bits_per_byte":
        scores = model.score_texts([task.question(record) for record in records])
        return {"bits_per_byte": _bits_per_byte(scores)}
    contexts = [
        task.context(record, examples)
        for record, examples in zip(records, task.examples(records), strict=True)
    ]
    if task.kind == "generative":
        return _written(task, model, records, contexts)
    if task.choices:
        return _chosen(task, model, records, contexts)
    answers = [task.delimiter + task.worked_answer(record) for record in records]
    scores = model.score(list(zip(contexts, answers, strict=True)))
    return {
        "accuracy": proportion([score.greedy for score in scores]),
        "bits_per_byte": _bits_per_byte(scores),
    }


def check(
    task: Task, model: LanguageModel, limit: int | None = None, modes: Sequence[str] = ()
) -> None:
    """See that a task can be measured, without asking the model anything.

    Args:
        task: As for :func:`measure`.
        model: As for :func:`measure`.
        limit: As for :func:`measure`.
        modes: As for :func:`measure`.

    Raises:
        UserError: If the task, its records, the modes, the tokenizer or the template do not fit.
    """
    check_modes(modes)
    rows = model.decoder.config.vocab_size
    if model.tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer has {model.tokenizer.vocab_size} tokens, the model only {rows} rows"
        )
    task, records = _prepared(task, limit)
    in_chat = task.kind == "chat" or (task.kind == "generative" and modes)
    if in_chat:
        check_template(task, model)
    examples = [[]] * len(records) if in_chat else task.examples(records)
    pairs = []
    for record, several in zip(records, examples, strict=True):
        context = task.question(record) if in_chat else task.context(record, several)
        if task.metric:
            GRADERS[task.metric]("", task.evaluate("answer", record))
            task.groups(record)
        elif task.kind != "bits_per_byte":
            options = task.answers(record)[0] if task.choices else [task.worked_answer(record)]
            pairs += [(context, task.delimiter + option) for option in options]
    check_requests([model.encode_pair(*pair) for pair in pairs], model.max_length)


def check_modes(modes: Sequence[str]) -> None:
    """See that all modes are known.

    Raises:
        UserError: If one is not.
    """
    for mode in modes:
        if mode not in OTHER:
            raise UserError(
                f"modes holds {shown(mode)}, expected {' or '.join(OTHER)}."
                f"{nearest(str(mode), OTHER)}"
            )


def _prepared(task: Task, limit: int | None) -> tuple[Task, list[Record]]:
    """The task with the smaller one of two limits, and its records."""
    if limit is not None:
        task = replace(task, limit=min(limit, task.limit or limit))
    if task.metric and task.metric not in GRADERS:
        raise UserError(
            f"task {task.name}: metric is '{task.metric}', expected one of {', '.join(GRADERS)}."
            f"{nearest(task.metric, GRADERS)}"
        )
    return task, task.records()


def _chosen(
    task: Task, model: LanguageModel, records: Sequence[Record], contexts: Sequence[str]
) -> Metrics:
    answers = [task.answers(record) for record in records]
    pairs = [
        (context, task.delimiter + option)
        for context, (options, _) in zip(contexts, answers, strict=True)
        for option in options
    ]
    scores = iter(model.score(pairs))
    hits, hits_per_byte, rights, chances = [], [], [], []
    for options, right in answers:
        several = [next(scores) for _ in options]
        hits.append(_best([s.log_prob for s in several]) == right)
        sizes = [max(1, len(option.encode())) for option in options]  # without the delimiter
        rates = [s.log_prob / size for s, size in zip(several, sizes, strict=True)]
        hits_per_byte.append(_best(rates) == right)
        rights.append(several[right])
        chances.append(1 / len(options))
    chance = sum(chances) / len(chances)
    metrics = {"accuracy": proportion(hits)}
    if task.kind == "cloze":  # letters are all of one length
        metrics["accuracy_per_byte"] = proportion(hits_per_byte)
    metrics["accuracy_centred"] = metrics["accuracy"].scaled(chance, 1 / (1 - chance))
    metrics["bits_per_byte"] = _bits_per_byte(rights)
    return metrics


def _written(
    task: Task, model: LanguageModel, records: Sequence[Record], contexts: Sequence[str]
) -> Metrics:
    prompts = [[*model.begin, *model.tokenizer.encode(context)] for context in contexts]
    sampling = Sampling(temperature=0.0, max_new_tokens=task.max_new_tokens, stop=task.stop)
    grade = GRADERS[task.metric]
    completions = model.generate(prompts, sampling)
    return {
        "accuracy": proportion(
            [
                grade(completion.text, task.evaluate("answer", record))
                for completion, record in zip(completions, records, strict=True)
            ]
        )
    }


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _bits_per_byte(scores: Sequence[Score]) -> Estimate:
    return ratio([-s.log_prob / math.log(2) for s in scores], [s.bytes for s in scores])
