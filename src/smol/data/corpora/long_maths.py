"""Long maths: documents in which what a line needs stands hundreds or thousands of tokens above.

Two kinds in turn, of very different lengths. In a worksheet all problems come first and the worked
solutions, which name a problem by its number alone, after the last one. In a ledger each payment
starts from the balances that two people were left with, wherever that was. Both can be checked from
their text alone.
"""

import math
import random
from collections.abc import Iterator
from itertools import islice

from smol.data.corpora import maths

# Fewest and most problems or payments: from about 256 to about 16,000 tokens.
PROBLEMS, PAYMENTS = (3, 170), (4, 400)


def documents(count: int, after: int, seed: int = 0) -> Iterator[str]:
    """Yield worksheets and ledgers in turn; half are shorter than the geometric mean of the range.

    Args:
        count: How many documents.
        after: How many problems of the same seed are left to another corpus: no worksheet has a
            problem in common with it, or with another worksheet.
        seed: Of problems, lengths and payments.
    """
    problems = islice(maths.problems(None, seed), after, None)
    for number in range(count):
        rng = random.Random(f"{seed}/long/{number}")
        if number % 2:
            yield ledger(rng, _length(rng, PAYMENTS))
        else:
            yield worksheet(list(islice(problems, _length(rng, PROBLEMS))))


def _length(rng: random.Random, bounds: tuple[int, int]) -> int:
    """Return a number whose logarithm is uniform."""
    low, high = map(math.log, bounds)
    return round(math.exp(rng.uniform(low, high)))


def worksheet(problems: list[maths.Problem]) -> str:
    """Return the questions, numbered, and then the solutions by number."""
    lines = [f"Problem {i}: {problem.question}" for i, problem in enumerate(problems, 1)]
    for i, problem in enumerate(problems, 1):
        lines += [f"Solution {i}:", *problem.steps, f"Answer: {problem.answer}"]
    return "\n".join(lines) + "\n"


def ledger(rng: random.Random, payments: int) -> str:
    """Return opening balances, payments with both new balances, and closing balances."""
    names = rng.sample(maths.NAMES, rng.randint(6, len(maths.NAMES)))
    balance = {name: rng.randint(50, 999) for name in names}
    total = sum(balance.values())
    lines = ["Opening balances in dollars:", *(f"{name}: {balance[name]}" for name in names)]
    for i in range(1, payments + 1):
        payer = rng.choice([name for name in names if balance[name] > 1])
        payee = rng.choice([name for name in names if name != payer])
        amount = rng.randint(2, min(balance[payer], 99))
        before = balance[payer], balance[payee]
        balance[payer] -= amount
        balance[payee] += amount
        lines.append(
            f"Payment {i}: {payer} pays {payee} {amount} dollars. "
            f"{payer}: {before[0]} - {amount} = {balance[payer]}. "
            f"{payee}: {before[1]} + {amount} = {balance[payee]}."
        )
    lines += ["Closing balances:", *(f"{name}: {balance[name]}" for name in names)]
    return "\n".join([*lines, f"Total at the opening and at the closing: {total}"]) + "\n"
