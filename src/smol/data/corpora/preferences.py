"""Preference pairs: a right, concise answer in the mode asked for, and one with a flaw."""

import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smol.data.corpora.chat import answer, conversation
from smol.data.corpora.chat_tasks import KINDS, Task, tasks

PAIRS = {"think": 1000, "no_think": 1000}
HELD_OUT = 20  # one in so many beside them
SEED = 10  # other tasks than in the conversations


def wrong(task: Task, mode: str, rng: random.Random) -> dict[str, str]:
    """The answer, and the reasoning, to another question of the kind."""
    while True:
        question, steps, other = KINDS[task.kind](rng, task.size)
        if str(other) != task.answer:
            return answer(Task(task.kind, task.size, question, tuple(steps), str(other)), mode)


def wrong_mode(task: Task, mode: str, rng: random.Random) -> dict[str, str]:
    """Right, but without the reasoning that was asked for."""
    return answer(task, "no_think")


def wordy(task: Task, mode: str, rng: random.Random) -> dict[str, str]:
    """Right, but not in the form of an answer that can be checked."""
    phrase = rng.choice(("I think it is {}, or so.", "The answer is: {}!", "It is {}, of course."))
    message = answer(task, mode)
    return message | {"content": phrase.format(task.answer)}


def over_long(task: Task, mode: str, rng: random.Random) -> dict[str, str]:
    """Right, but said again and again, reasoning included."""
    message, times = answer(task, mode), rng.randint(3, 5)
    return {
        key: text if key == "role" else "\n".join([text] * times) for key, text in message.items()
    }


FLAWS: dict[str, Callable[[Task, str, random.Random], dict[str, str]]] = {
    flaw.__name__: flaw for flaw in (wrong, wrong_mode, wordy, over_long)
}


def records(mode: str, count: int, seed: int = SEED, split: str = "train") -> Iterator[dict]:
    """Yield pairs in the mode ``think`` or ``no_think``, each with a flaw of its own.

    A quarter of them come after an earlier turn, half of these in the other mode, which the user
    then changes with a flag.

    Args:
        mode: In which the question is to be answered.
        count: How many.
        seed: Of tasks and flaws.
        split: As for :func:`smol.data.corpora.chat_tasks.tasks`.
    """
    source = tasks(split, seed + (mode == "think"))
    for number in range(count):
        rng = random.Random(f"{seed}/{split}/{mode}/{number}")
        # After the empty block that begins an answer without reasoning, none can be begun.
        flaw = rng.choice([f for f in FLAWS if f != "wrong_mode" or mode == "think"])
        turns: list[tuple[Task, str]] = []
        if rng.random() < 0.25:
            turns = [(next(source), rng.choice(("think", "no_think")))]
        task = next(source)
        messages = conversation([*turns, (task, mode)], flags=bool(turns))
        yield {
            "prompt": messages[:-1],
            "chosen": messages[-1:],
            "rejected": [FLAWS[flaw](task, mode, rng)],
            "flaw": flaw,
            "task": asdict(task),
        }


def ensure_preferences(data_dir: str | Path, log: Callable[[str], None] = print) -> Path:
    """Write the pairs where they are missing.

    ``preferences/think.jsonl`` and ``no_think.jsonl`` are trained on, ``held_out_think.jsonl`` and
    ``held_out_no_think.jsonl`` are about held-out tasks.

    Args:
        data_dir: Folder of the embedded corpora.
        log: Receives what is worth a line; nothing when all is there.

    Returns:
        The folder of the pairs.
    """
    folder = Path(data_dir) / "preferences"
    if folder.exists():
        return folder
    log(f"{folder}: generating preference pairs.")
    part = Path(f"{folder}.{os.getpid()}.part")
    part.mkdir(parents=True, exist_ok=True)
    for mode, count in PAIRS.items():
        _write(part / f"{mode}.jsonl", records(mode, count))
        held_out = records(mode, count // HELD_OUT, split="instances")
        _write(part / f"held_out_{mode}.jsonl", held_out)
    os.replace(part, folder)
    return folder


def _write(file: Path, pairs: Iterator[dict[str, Any]]) -> None:
    with open(file, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
