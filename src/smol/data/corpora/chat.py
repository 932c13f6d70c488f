"""Chat: conversations about generated tasks, each answered with and without reasoning.

No run of 13 words of a task to evaluate on, nor a whole question that is shorter, stands in a
question that is trained on.
"""

import itertools
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smol.data.corpora.chat_tasks import KINDS, SPLITS, UNSEEN, Task, contaminated, tasks

CONVERSATIONS = {"think": 4000, "no_think": 4000, "switch": 2500}
TURNS = {"think": (1, 6), "no_think": (1, 6), "switch": (3, 5), "reasoning": (1, 1)}
"""At least and at most. Metadata is as long as two turns: in more of them more is trained on."""
REASONING = 15_000  # conversations of mid-training
EVALUATED = 40  # held-out tasks of each kind and split
SYSTEM = ("You are a careful teacher.", "You answer in as few words as you can.", "You are Smol.")


def answer(task: Task, mode: str) -> dict[str, str]:
    """The right answer as a message, with reasoning in mode ``think``."""
    message = {"role": "assistant", "content": task.answer}
    return message | ({"reasoning_content": "\n".join(task.steps)} if mode == "think" else {})


def conversation(turns: Sequence[tuple[Task, str]], flags: bool = False) -> list[dict[str, str]]:
    """The messages of a conversation.

    Args:
        turns: Tasks, and the mode each is answered in.
        flags: Whether a user asks for the mode where it changes, and in the first turn.
    """
    messages, before = [], None
    for task, mode in turns:
        flag = f" /{mode}" if flags and mode != before else ""
        messages += [{"role": "user", "content": task.question + flag}, answer(task, mode)]
        before = mode
    return messages


def records(name: str, count: int, seed: int = 0, split: str = "train") -> Iterator[dict[str, Any]]:
    """Yield conversations with the tasks they are made of.

    Args:
        name: ``think``, ``no_think`` (the same tasks answered either way), ``switch`` (the mode
            changing on request) or ``reasoning`` (a task with reasoning); see ``TURNS``.
        count: How many.
        seed: Of tasks and conversations.
        split: As for :func:`tasks`.
    """
    source = tasks(split, seed + {"switch": 1, "reasoning": 2}.get(name, 0))
    for number in range(count):
        rng = random.Random(f"{seed}/{split}/{number}")
        chosen = list(itertools.islice(source, rng.randint(*TURNS[name])))
        modes = [name] * len(chosen)
        if name == "switch":
            modes = [rng.choice(("think", "no_think")) for _ in chosen]
        elif name == "reasoning":
            modes = ["think"]
        messages = conversation(list(zip(chosen, modes, strict=True)), flags=name == "switch")
        if name != "reasoning" and rng.random() < 0.2:
            messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM)})
        yield {"messages": messages, "tasks": [asdict(task) for task in chosen]}


def ensure_chat(data_dir: str | Path, log: Callable[[str], None] = print) -> Path:
    """Write what is missing of the chat corpus.

    ``chat/think.jsonl``, ``no_think.jsonl``, ``switch.jsonl`` and ``reasoning.jsonl`` are trained
    on, ``held_out_*.jsonl`` are conversations of held-out instances, and ``tasks.jsonl`` holds the
    tasks to evaluate on, each with its ``split``.

    Args:
        data_dir: Folder of the embedded corpora.
        log: Receives what is worth a line; nothing when all is there.

    Returns:
        The folder of the corpus.
    """
    folder = Path(data_dir) / "chat"
    if folder.exists():
        return folder
    log(f"{folder}: generating conversations.")
    part = Path(f"{folder}.{os.getpid()}.part")
    part.mkdir(parents=True, exist_ok=True)
    training: set[str] = set()
    for name, count in {**CONVERSATIONS, "reasoning": REASONING}.items():
        made = list(records(name, count))
        training |= {task["question"] for record in made for task in record["tasks"]}
        _write(part / f"{name}.jsonl", made)
        _write(part / f"held_out_{name}.jsonl", records(name, count // 40, split="instances"))
    _write(part / "tasks.jsonl", _evaluated(training))
    os.replace(part, folder)
    return folder


def _evaluated(training: set[str]) -> Iterator[dict[str, Any]]:
    """Held-out tasks, all different and none of them contaminated."""
    for split in SPLITS[1:]:
        kinds = UNSEEN if split == "unseen" else KINDS
        drawn = itertools.islice(tasks(split), 4 * EVALUATED * len(kinds))
        by_question = {task.question: task for task in drawn}
        clean = by_question.keys() - contaminated(by_question, training)
        taken = dict.fromkeys(kinds, 0)
        for task in by_question.values():
            if task.question in clean and taken[task.kind] < EVALUATED:
                taken[task.kind] += 1
                yield {"split": split} | asdict(task)


def _write(file: Path, made: Iterable[dict[str, Any]]) -> None:
    with open(file, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in made)
