"""Generated tasks with answers that can be checked.

A task depends on the seed and its number alone. Kept from training are single tasks of the trained
kinds, larger ones of them (``sizes``), and a few kinds of their own (``unseen``).
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

from smol.data.corpora.maths import NAMES, THINGS, UNITS
from smol.data.prepare import split_of

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
WORDS = (
    "red blue green pink gold black white brown cat dog bird fish lion bear wolf tree rose leaf "
    "moon star rain snow wind fire"
).split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIZES, LARGER = (1, 2), 3  # trained and held out
HELD_OUT = 0.1  # of the questions of the trained kinds and sizes
NGRAM = 13  # words, as is usual against contamination

Made = tuple[str, list[str], object]


@dataclass(frozen=True)
class Task:
    """A question, the steps to its answer, and the only right answer.

    Attributes:
        kind: Name of the function that made it.
        size: How large it is, from 1.
        question: What a user asks.
        steps: Lines of reasoning.
        answer: As it should be written.
    """

    kind: str
    size: int
    question: str
    steps: tuple[str, ...]
    answer: str


def check(task: Task, answer: str) -> bool:
    """Whether an answer is right: what follows the reasoning is the answer and nothing else.

    Args:
        task: The task.
        answer: What a model wrote, reasoning included, without the token that ends its turn.
    """
    return answer.rpartition("</think>")[2].strip().removesuffix(".") == task.answer


# -- kinds: each returns a question, steps and the answer ----------------------------------------


def addition(rng: random.Random, size: int) -> Made:
    """Digit by digit from the right; ``size`` digits."""
    a, b = _pair(rng, size)
    return f"What is {a} + {b}?", _columns(a, b), a + b


def subtraction(rng: random.Random, size: int) -> Made:
    """The larger number first; checked by adding."""
    b, a = sorted(_pair(rng, size))
    return f"What is {a} - {b}?", [*_columns(a - b, b), f"So {a} - {b} = {a - b}."], a - b


def more(rng: random.Random, size: int) -> Made:
    """A sum in words."""
    (a, b), (name, thing) = _pair(rng, size), _somebody(rng)
    question = f"{name} has {a} {thing} and gets {b} more. How many now?"
    return question, [f"{a} + {b}", *_columns(a, b)], a + b


def fewer(rng: random.Random, size: int) -> Made:
    """A difference in words."""
    b, a = sorted(_pair(rng, size))
    name, thing = _somebody(rng)
    question = f"{name} has {a} {thing} and loses {b}. How many are left?"
    return question, [f"{a} - {b}", *_columns(a - b, b), f"So {a - b} are left."], a - b


def cost(rng: random.Random, size: int) -> Made:
    """A small product in words, added up."""
    count, price, (name, thing) = size + 1, _number(rng, size), _somebody(rng)
    sums = " + ".join([str(price)] * count)
    question = f"{name} buys {count} {thing} at {price} dollars each. How many dollars?"
    return question, [f"{count} * {price}", f"{sums} = {count * price}"], count * price


def comparison(rng: random.Random, size: int) -> Made:
    """Yes or no."""
    a, b = _number(rng, size), _number(rng, size)
    answer = "yes" if a > b else "no"
    sign = ">" if a > b else "<" if a < b else "="
    return f"Is {a} larger than {b}? Say yes or no.", [f"{a} {sign} {b}"], answer


def largest(rng: random.Random, size: int) -> Made:
    """The largest of a list, kept while reading it."""
    numbers = rng.sample(range(1, 100), size + 2)
    return f"Which is the largest: {_list(numbers)}?", _running(numbers, max), max(numbers)


def ordering(rng: random.Random, size: int) -> Made:
    """A list in order, the smallest taken out again and again."""
    numbers = rng.sample(range(1, 100), size + 2)
    ordered, steps, left = sorted(numbers), [], list(numbers)
    for number in ordered[:-1]:
        steps.append(f"{_list(left)}: smallest {number}")
        left.remove(number)
    return f"Put in order: {_list(numbers)}", steps, _list(ordered)


def position(rng: random.Random, size: int) -> Made:
    """An item of a list by its number."""
    words, place = rng.sample(WORDS, size + 2), rng.randrange(size + 2)
    steps = [f"{i}: {word}" for i, word in enumerate(words[: place + 1], 1)]
    return f"What is item {place + 1} of: {_list(words)}?", steps, words[place]


def reversal(rng: random.Random, size: int) -> Made:
    """Letters from the last to the first."""
    letters = rng.sample(LETTERS, size + 2)
    steps = [f"{i}: {letter}" for i, letter in enumerate(letters, 1)]
    return f"Reverse: {' '.join(letters)}", steps, " ".join(reversed(letters))


def counting(rng: random.Random, size: int) -> Made:
    """How often a letter occurs, counted while reading."""
    few = rng.sample(LETTERS, 3)
    letters = [rng.choice(few) for _ in range(size + 3)]
    steps, seen = [], 0
    for letter in letters:
        seen += letter == few[0]
        steps.append(f"{letter}: {seen}")
    return f"How often is {few[0]} in: {' '.join(letters)}?", steps, seen


def weekday(rng: random.Random, size: int) -> Made:
    """A day of the week, counted on."""
    start, days = rng.randrange(7), 4 * size - rng.randrange(4)
    steps = [f"{i}: {DAYS[(start + i) % 7]}" for i in range(1, days + 1)]
    question = f"Today is {DAYS[start]}. What day is it in {days} days?"
    return question, steps, DAYS[(start + days) % 7]


def calendar(rng: random.Random, size: int) -> Made:
    """A date some days later."""
    start = date(2025, 1, 1) + timedelta(rng.randrange(365))
    days = 4 * size - rng.randrange(4)
    end = start + timedelta(days)
    last = (start.replace(day=28) + timedelta(4)).replace(day=1) - timedelta(1)
    steps = [f"{start:%B} has {last.day} days.", f"{start.day} + {days} = {start.day + days}"]
    if end.month != start.month:
        steps.append(f"{start.day + days} - {last.day} = {end.day}")
    question = f"Which date is {days} days after {start:%B} {start.day}?"
    return question, steps, f"{end:%B} {end.day}"


def units(rng: random.Random, size: int) -> Made:
    """A whole number of a larger unit in a smaller one."""
    large, small, factor = rng.choice(UNITS)
    count = _number(rng, size) + 1
    steps = [f"1 of {large} is {factor} {small}.", f"{count} * {factor} = {count * factor}"]
    return f"How many {small} are {count} {large}?", steps, count * factor


def capitals(rng: random.Random, size: int) -> Made:
    """An instruction on the form: capital letters."""
    words = rng.sample(WORDS, size + 1)
    steps = [f"{word}: {word.upper()}" for word in words]
    return f"Write in capital letters: {_list(words)}", steps, _list(words).upper()


def repetition(rng: random.Random, size: int) -> Made:
    """An instruction on the form: so many times, with such a mark in between."""
    word, times, mark = rng.choice(WORDS), 2 * size + rng.randrange(2), rng.choice("-+/")
    other = rng.choice(WORDS)
    steps = [f"{i}: {word}" for i in range(1, times + 1)] + [f"then {other}"]
    question = f"Write {word} {times} times with {mark} in between, then {other}."
    return question, steps, f" {mark} ".join([word] * times) + f" {other}"


def smallest(rng: random.Random, size: int) -> Made:
    """The smallest of a list."""
    numbers = rng.sample(range(1, 100), size + 2)
    return f"Which is the smallest: {_list(numbers)}?", _running(numbers, min), min(numbers)


def doubling(rng: random.Random, size: int) -> Made:
    """Twice a number."""
    a = _number(rng, size)
    return f"What is twice {a}?", [f"{a} + {a}", *_columns(a, a)], 2 * a


def last_letter(rng: random.Random, size: int) -> Made:
    """The last of several letters."""
    letters = rng.sample(LETTERS, size + 2)
    return f"Which is the last of: {' '.join(letters)}?", [], letters[-1]


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _pair(rng: random.Random, digits: int) -> tuple[int, int]:
    """A number of so many digits, and one that may be smaller."""
    return _number(rng, digits), _number(rng, rng.randint(1, digits))


def _somebody(rng: random.Random) -> tuple[str, str]:
    return rng.choice(NAMES), rng.choice(THINGS)


def _list(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


def _columns(a: int, b: int) -> list[str]:
    """Long addition, a line for each column."""
    steps, carry, width = [], 0, max(len(str(a)), len(str(b)))
    for x, y in zip(str(a).zfill(width)[::-1], str(b).zfill(width)[::-1], strict=True):
        total = int(x) + int(y) + carry
        brought = f" + {carry}" if carry else ""
        carry = total // 10
        steps.append(f"{x} + {y}{brought} = {total}" + (f", carry {carry}" if carry else ""))
    return steps


def _running(numbers: list[int], best: Callable) -> list[str]:
    return [f"{n}: {best(numbers[: i + 1])}" for i, n in enumerate(numbers)]


KINDS: dict[str, Callable[[random.Random, int], Made]] = {
    make.__name__: make
    for make in (
        addition, subtraction, more, fewer, cost, comparison, largest, ordering, position, reversal,
        counting, weekday, calendar, units, capitals, repetition,
    )
}  # fmt: skip
UNSEEN = {make.__name__: make for make in (smallest, doubling, last_letter)}
SPLITS = ("train", "instances", "sizes", "unseen")


# -- tasks ---------------------------------------------------------------------------------------


def tasks(split: str, seed: int = 0) -> Iterator[Task]:
    """Yield no end of tasks, every kind in turn.

    Args:
        split: ``train``, or one of what is held out: ``instances`` of the trained kinds and sizes,
            larger ``sizes``, or ``unseen`` kinds.
        seed: Of the tasks; what is held out does not depend on it.
    """
    kinds = list((UNSEEN if split == "unseen" else KINDS).items())
    for number in itertools.count():
        kind, make = kinds[number % len(kinds)]
        rng = random.Random(f"{seed}/{split}/{number}")
        while True:
            size = LARGER if split == "sizes" else rng.choice(SIZES)
            question, steps, answer = make(rng, size)
            if split not in ("train", "instances") or is_held_out(question) == (split != "train"):
                break
        yield Task(kind, size, question, tuple(steps), str(answer))


def is_held_out(question: str) -> bool:
    """Whether no training task may have this question; a function of its text."""
    digest = hashlib.sha256(question.encode()).digest()
    return split_of(digest, HELD_OUT) == "held_out"


def contaminated(questions: Iterable[str], training: Iterable[str]) -> set[str]:
    """Questions of which a run of 13 words, or all if shorter, stands in a training question."""
    grams: dict[tuple[str, ...], set[str]] = {}
    for question in questions:
        for gram in _grams(question.split(), NGRAM):
            grams.setdefault(gram, set()).add(question)
    lengths = {len(gram) for gram in grams}
    seen = {g for text in set(training) for n in lengths for g in _grams(text.split(), n)}
    return set().union(*(grams[gram] for gram in seen & grams.keys()))


def _grams(words: list[str], n: int) -> Iterator[tuple[str, ...]]:
    n = min(n, len(words))
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))
