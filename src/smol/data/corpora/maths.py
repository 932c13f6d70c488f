"""Maths: generated problems with a worked solution and an answer that can be checked.

A problem depends on the seed and its number alone. The last line of its text is ``Answer: ...``.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

NAMES = [
    "Amina", "Bruno", "Chloe", "Daniel", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas",
    "Kira", "Liam", "Maya", "Noah", "Olga", "Pedro", "Quinn", "Rosa", "Samir", "Tara", "Umar",
    "Vera", "Wei", "Yara", "Zoe",
]  # fmt: skip
THINGS = [
    "apples", "books", "coins", "cards", "marbles", "pencils", "shells", "stamps", "stickers",
    "tickets",
]  # fmt: skip
# (larger unit, smaller unit, how many of the smaller make one of the larger)
UNITS = (
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("centimetres", "millimetres", 10),
    ("kilograms", "grams", 1000),
    ("litres", "millilitres", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
)


@dataclass(frozen=True)
class Problem:
    """A question, the steps to its answer, and the answer as it should be written."""

    kind: str
    question: str
    steps: tuple[str, ...]
    answer: str

    @property
    def text(self) -> str:
        """The document: question, steps and a last line ``Answer: ...``."""
        return (
            "\n".join((f"Problem: {self.question}", *self.steps, f"Answer: {self.answer}")) + "\n"
        )


def documents(count: int, seed: int = 0) -> Iterator[str]:
    """Yield the texts of ``count`` different problems."""
    for problem in problems(count, seed):
        yield problem.text


def problems(count: int | None, seed: int = 0) -> Iterator[Problem]:
    """Yield ``count`` problems, or no end of them, all different, every kind in turn."""
    kinds = list(KINDS.items())
    seen: set[str] = set()
    number = 0
    while count is None or len(seen) < count:
        kind, make = kinds[number % len(kinds)]
        question, steps, answer = make(random.Random(f"{seed}/{number}"))
        number += 1
        if question not in seen:
            seen.add(question)
            yield Problem(kind, question, tuple(steps), str(answer))


Made = tuple[str, list[str], object]


def _number(rng: random.Random, most_digits: int) -> int:
    """Return a number whose count of digits is uniform, so that short ones are not rare."""
    digits = rng.randint(1, most_digits)
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


def addition(rng: random.Random) -> Made:
    """Long addition, column by column from the right."""
    a, b = _number(rng, 6), _number(rng, 6)
    steps, carry = [], 0
    width = max(len(str(a)), len(str(b)))
    for place, (x, y) in enumerate(zip(_digits(a, width), _digits(b, width), strict=True)):
        total = x + y + carry
        brought = f" + {carry}" if carry else ""
        carry, digit = divmod(total, 10)
        sent = f", write {digit}, carry {carry}" if carry else f", write {digit}"
        steps.append(f"Column {place + 1}: {x} + {y}{brought} = {total}{sent}.")
    if carry:
        steps.append(f"Write the last carry: {carry}.")
    return f"What is {a} + {b}?", steps, a + b


def subtraction(rng: random.Random) -> Made:
    """Long subtraction with borrowing, the larger number first."""
    a, b = sorted((_number(rng, 6), _number(rng, 6)), reverse=True)
    steps, borrow = [], 0
    width = len(str(a))
    for place, (x, y) in enumerate(zip(_digits(a, width), _digits(b, width), strict=True)):
        taken = f" - {borrow}" if borrow else ""
        digit = x - y - borrow
        borrow = int(digit < 0)
        if borrow:
            steps.append(
                f"Column {place + 1}: {x} - {y}{taken} is below 0, borrow 10: write {digit + 10}."
            )
        else:
            steps.append(f"Column {place + 1}: {x} - {y}{taken} = {digit}.")
    return f"What is {a} - {b}?", steps, a - b


def _digits(number: int, width: int) -> list[int]:
    """Return the digits from the lowest up, filled with zeros."""
    return [int(digit) for digit in reversed(str(number).zfill(width))]


def multiplication(rng: random.Random) -> Made:
    """Multiplication by parts: one product per digit of the second factor."""
    a, b = _number(rng, 4), rng.randint(2, 999)
    steps, parts = [], []
    for place, digit in enumerate(reversed(str(b))):
        if digit != "0":
            factor = int(digit) * 10**place
            parts.append(a * factor)
            steps.append(f"{a} * {factor} = {a * factor}")
    if len(parts) > 1:
        steps.append(f"{' + '.join(map(str, parts))} = {sum(parts)}")
    return f"What is {a} * {b}?", steps, a * b


def division(rng: random.Random) -> Made:
    """Division with remainder, and the check by multiplying back."""
    divisor = rng.randint(2, 60)
    dividend = divisor * rng.randint(1, 300) + rng.randint(0, divisor - 1)
    quotient, rest = divmod(dividend, divisor)
    steps = [
        f"{divisor} * {quotient} = {divisor * quotient}",
        f"{divisor} * {quotient + 1} = {divisor * (quotient + 1)}, which is more than {dividend}.",
        f"{dividend} - {divisor * quotient} = {rest}",
    ]
    question = f"Divide {dividend} by {divisor}. Give the quotient and the remainder."
    return question, steps, f"{quotient} remainder {rest}"


def linear_equation(rng: random.Random) -> Made:
    """``a*x + b = c`` with a whole solution, positive or negative."""
    a, x, b = rng.randint(2, 25), rng.randint(-40, 40), rng.randint(-90, 90)
    c = a * x + b
    sign = "+" if b >= 0 else "-"
    inverse = "Subtract" if b >= 0 else "Add"
    steps = [
        f"{inverse} {abs(b)} on both sides: {a}x = {c - b}.",
        f"Divide both sides by {a}: x = {c - b} / {a} = {x}.",
        f"Check: {a} * ({x}) {sign} {abs(b)} = {c}.",
    ]
    return f"Solve for x: {a}x {sign} {abs(b)} = {c}", steps, f"x = {x}"


def percentage(rng: random.Random) -> Made:
    """A whole percentage of a number, through one hundredth of it."""
    percent, base = rng.randint(1, 150), rng.randint(1, 80) * 50
    one = Fraction(base, 100)
    value = one * percent
    steps = [
        f"1% of {base} is {base} / 100 = {_decimal(one)}.",
        f"{percent}% is {percent} * {_decimal(one)} = {_decimal(value)}.",
    ]
    return f"What is {percent}% of {base}?", steps, _decimal(value)


def _decimal(value: Fraction) -> str:
    """Write a fraction whose denominator divides 100."""
    whole, rest = divmod(value * 100, 100)
    return f"{whole}.{int(rest):02d}".rstrip("0") if rest else str(whole)


def fractions(rng: random.Random) -> Made:
    """Sum or difference of two fractions over their common denominator, in lowest terms."""
    a, c = rng.randint(1, 12), rng.randint(1, 12)
    b, d = rng.randint(2, 15), rng.randint(2, 15)
    sign = rng.choice("+-")
    common, top_a, top_c = b * d, a * d, c * b
    top = top_a + top_c if sign == "+" else top_a - top_c
    value = Fraction(top, common)
    steps = [
        f"Common denominator: {b} * {d} = {common}.",
        f"{a}/{b} = {top_a}/{common} and {c}/{d} = {top_c}/{common}.",
        f"{top_a} {sign} {top_c} = {top}, so the result is {top}/{common}.",
    ]
    if str(value) != f"{top}/{common}":
        steps.append(f"In lowest terms: {value}.")
    return f"Calculate {a}/{b} {sign} {c}/{d} in lowest terms.", steps, value


def sequence(rng: random.Random) -> Made:
    """The next term of an arithmetic or a geometric sequence."""
    if rng.random() < 0.7:
        start, step = rng.randint(-50, 100), rng.choice([-1, 1]) * rng.randint(2, 30)
        terms = [start + step * i for i in range(5)]
        gaps = ", ".join(f"{y} - {x} = {y - x}" for x, y in pairwise(terms[:4]))
        rule = f"The difference is always {step}."
        last = (
            f"{terms[3]} + {step} = {terms[4]}"
            if step > 0
            else f"{terms[3]} - {-step} = {terms[4]}"
        )
    else:
        start, ratio = rng.randint(1, 40), rng.randint(2, 7)
        terms = [start * ratio**i for i in range(5)]
        gaps = ", ".join(f"{y} / {x} = {ratio}" for x, y in pairwise(terms[:4]))
        rule = f"The ratio is always {ratio}."
        last = f"{terms[3]} * {ratio} = {terms[4]}"
    shown = ", ".join(map(str, terms[:4]))
    return f"What comes next: {shown}, ...?", [f"{gaps}. {rule}", last], terms[4]


def units(rng: random.Random) -> Made:
    """A conversion between units, in either direction, with a whole result."""
    large, small, factor = rng.choice(UNITS)
    count = rng.randint(2, 400)
    rule = f"One of the {large} is {factor} {small}."
    if rng.random() < 0.5:
        steps = [rule, f"{count} * {factor} = {count * factor}"]
        return f"How many {small} are {count} {large}?", steps, f"{count * factor} {small}"
    total = count * factor
    steps = [rule, f"{total} / {factor} = {count}"]
    return f"How many {large} are {total} {small}?", steps, f"{count} {large}"


def buying(rng: random.Random) -> Made:
    """Cost of several things, and the change from what was paid."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    count, price = rng.randint(2, 30), rng.randint(2, 25)
    cost = count * price
    paid = -(-(cost + rng.randint(1, 60)) // 10) * 10
    question = (
        f"{name} buys {count} {thing} at {price} dollars each and pays with {paid} dollars. "
        f"How many dollars does {name} get back?"
    )
    steps = [
        f"The {thing} cost {count} * {price} = {cost} dollars.",
        f"{paid} - {cost} = {paid - cost}",
    ]
    return question, steps, paid - cost


def sharing(rng: random.Random) -> Made:
    """Some are given away, the rest is shared equally."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    friends, each, given = rng.randint(2, 12), rng.randint(2, 40), rng.randint(1, 60)
    total = friends * each + given
    question = (
        f"{name} has {total} {thing}, gives {given} away and shares the rest equally among "
        f"{friends} friends. How many {thing} does each friend get?"
    )
    steps = [
        f"After giving some away: {total} - {given} = {total - given}.",
        f"Each friend gets {total - given} / {friends} = {each}.",
    ]
    return question, steps, each


def travel(rng: random.Random) -> Made:
    """Distance from two legs at constant speeds."""
    name = rng.choice(NAMES)
    v1, t1 = rng.randint(2, 24) * 5, rng.randint(1, 9)
    v2, t2 = rng.randint(2, 24) * 5, rng.randint(1, 9)
    question = (
        f"{name} travels {t1} hours at {v1} km per hour and then {t2} hours at {v2} km per hour. "
        f"How many km is that in all, and what is the average speed in km per hour?"
    )
    total, hours = v1 * t1 + v2 * t2, t1 + t2
    mean = Fraction(total, hours)
    steps = [
        f"First part: {t1} * {v1} = {v1 * t1} km.",
        f"Second part: {t2} * {v2} = {v2 * t2} km.",
        f"In all: {v1 * t1} + {v2 * t2} = {total} km in {t1} + {t2} = {hours} hours.",
        f"Average speed: {total} / {hours} = {mean}.",
    ]
    return question, steps, f"{total} km, {mean} km per hour"


def ages(rng: random.Random) -> Made:
    """Two ages from their sum and a multiple."""
    first, second = rng.sample(NAMES, 2)
    times, young = rng.randint(2, 6), rng.randint(2, 18)
    total = young * (times + 1)
    question = (
        f"{first} is {times} times as old as {second}. Together they are {total} years old. "
        f"How old is {first}?"
    )
    steps = [
        f"Let {second} be x years old. Then {first} is {times}x and x + {times}x = {total}.",
        f"{times + 1}x = {total}, so x = {young}.",
        f"{first} is {times} * {young} = {times * young}.",
    ]
    return question, steps, times * young


KINDS: dict[str, Callable[[random.Random], Made]] = {
    make.__name__: make
    for make in (
        addition, subtraction, multiplication, division, linear_equation, percentage, fractions,
        sequence, units, buying, sharing, travel, ages,
    )
}  # fmt: skip
