"""Preference pairs: a right, concise answer in the mode asked for, and one with a flaw.

Most flaws are near misses. A flaw that a fine-tuned model never has teaches it nothing: it tells a
wordy answer, or one to another question, from a right one before the first step.
"""

import json
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from smol.data.corpora.chat import answer, conversation
from smol.data.corpora.chat_tasks import DAYS, Task, tasks

PAIRS = {"think": 1000, "no_think": 1000}
HELD_OUT = 8  # one in so many beside them
NEAR_MISSES = 0.7  # of all pairs
SEED = 10  # other tasks than in the conversations
ANSWERS = ("yes", "no")


def near_miss(task: Task, mode: str, rng: random.Random) -> dict[str, str]:
    """Wrong by a little; every other time a step of the reasoning is, too."""
    steps = list(task.steps)
    if steps and rng.random() < 0.5:
        place = rng.randrange(len(steps))
        steps[place] = altered(steps[place], task.question, rng)
    wrong = altered(task.answer, task.question, rng)
    return answer(replace(task, steps=tuple(steps), answer=wrong), mode)


def altered(text: str, question: str, rng: random.Random) -> str:
    """Another text: a digit one more or less, neighbours exchanged, or something else of the kind.

    Args:
        text: Of at least one letter or digit.
        question: Whose numbers and words may take the place of the only one.
        rng: Chooses.
    """
    numbers = [number for number in re.findall(r"\d+", question) if number != text]
    if text.isdigit() and numbers and rng.random() < 0.5:
        return rng.choice(numbers)
    if re.search(r"\d", text):
        return _with_another_digit(text, rng)
    words = list(re.finditer(r"\w+", text))
    if pairs := [(a, b) for a, b in pairwise(words) if a[0] != b[0]]:
        a, b = rng.choice(pairs)
        return text[: a.start()] + b[0] + text[a.end() : b.start()] + a[0] + text[b.end() :]
    return text.replace(words[0][0], _other_word(words[0][0], question, rng))


def _with_another_digit(text: str, rng: random.Random) -> str:
    place = rng.choice([i for i, letter in enumerate(text) if letter.isdigit()])
    digit = (int(text[place]) + rng.choice((1, 9))) % 10
    before, after = text[:place], text[place + 1 :]
    # No number of several digits begins with 0.
    if digit == 0 and after[:1].isdigit() and not before[-1:].isdigit():
        digit = 1 + int(text[place]) % 9
    return f"{before}{digit}{after}"


def _other_word(word: str, question: str, rng: random.Random) -> str:
    if word in DAYS:
        return rng.choice([DAYS[(DAYS.index(word) + step) % 7] for step in (1, 6)])
    known = ANSWERS if word in ANSWERS else re.findall(r"\w+", question)
    return rng.choice([other for other in known if other != word])


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
    flaw.__name__: flaw for flaw in (near_miss, wrong_mode, wordy, over_long)
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
        flaw = "near_miss"
        if rng.random() >= NEAR_MISSES:
            # After the empty block that begins an answer without reasoning, none can be begun.
            flaw = rng.choice([f for f in list(FLAWS)[1:] if f != "wrong_mode" or mode == "think"])
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
