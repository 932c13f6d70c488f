"""Solves the generated problems from their words, for tests."""

import re
from fractions import Fraction

# Each unit in the smallest one of its kind.
SIZES = {
    "kilometres": 10**6, "metres": 1000, "centimetres": 10, "millimetres": 1,
    "kilograms": 1000, "grams": 1, "litres": 1000, "millilitres": 1,
    "weeks": 604800, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1,
}  # fmt: skip


def solve(question: str) -> str:
    """Answer a problem from its words alone, by other means than the generator's."""
    n = [int(number) for number in re.findall(r"(?<![\w)])-?\d+", question)]
    if found := re.fullmatch(r"What is (\d+) ([-+*]) (\d+)\?", question):
        a, sign, b = found.groups()
        return str({"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(a), int(b)))
    if question.startswith("Divide"):
        return f"{n[0] // n[1]} remainder {n[0] % n[1]}"
    if found := re.fullmatch(r"Solve for x: (\d+)x ([-+]) (\d+) = (-?\d+)", question):
        a, sign, b, c = found.groups()
        b = int(sign + b)
        (root,) = [x for x in range(-100, 101) if int(a) * x + b == int(c)]
        return f"x = {root}"
    if "%" in question:
        return f"{n[0] * n[1] / 100:.2f}".rstrip("0").rstrip(".")
    if found := re.fullmatch(r"Calculate (\S+) ([-+]) (\S+) in lowest terms\.", question):
        a, sign, b = Fraction(found[1]), found[2], Fraction(found[3])
        return str(a + b if sign == "+" else a - b)
    if question.startswith("What comes next"):
        if n[1] - n[0] == n[2] - n[1]:
            return str(2 * n[3] - n[2])
        return str(n[3] * n[3] // n[2])
    if found := re.fullmatch(r"How many (\w+) are (\d+) (\w+)\?", question):
        to, count, of = found[1], int(found[2]), found[3]
        return f"{count * SIZES[of] // SIZES[to]} {to}"
    if "buys" in question:
        return str(n[2] - n[0] * n[1])
    if "shares the rest" in question:
        return str((n[0] - n[1]) // n[2])
    if "travels" in question:
        total = n[0] * n[1] + n[2] * n[3]
        return f"{total} km, {Fraction(total, n[0] + n[2])} km per hour"
    times, total = n
    return str(total - total // (times + 1))


def check_steps(steps: list[str]) -> None:
    """Evaluate every ``a op b ... = c`` that a solution states."""
    number = r"\(?-?\d+(?:\.\d+)?\)?"
    result = r"-?\d+(?:\.\d+)?(?:/\d+)?"
    stated = re.compile(rf"(?<![\w.])({number}(?: [-+*/] {number})+) = ({result})")
    checked = 0
    for step in steps:
        for left, right in stated.findall(step):
            exact = re.sub(r"\d+(?:\.\d+)?", r"Fraction('\g<0>')", left)
            assert eval(exact, {"Fraction": Fraction}) == Fraction(right), step
            checked += 1
    assert checked or "borrow" in " ".join(steps), steps
