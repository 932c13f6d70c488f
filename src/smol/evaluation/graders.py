"""Whether a written answer is right."""

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from smol.errors import UserError, shown

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")


def exact_match(text: str, expected: Any) -> bool:
    """Nothing but the expected answer, up to blanks around it and a full stop behind it."""
    return _plain(text) == _plain(str(expected))


def _plain(text: str) -> str:
    return " ".join(text.split()).removesuffix(".")


def number(text: str, expected: Any) -> bool:
    """The last number of the text is the expected one; ``1,000.0`` equals ``1000``."""
    found, wanted = (NUMBER.findall(str(x)) for x in (text, expected))
    if not wanted:
        raise UserError(f"a task's answer is {expected!r}, expected a number for metric number")
    return bool(found) and _value(found[-1]) == _value(wanted[-1])


def _value(digits: str) -> float:
    return float(digits.replace(",", ""))


def maths(text: str, expected: Any) -> bool:
    """An expression or number equal to the expected one, by the library math-verify.

    Raises:
        UserError: If the library is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UserError(
            "metric maths needs the package math-verify: pip install math-verify, "
            "or use metric number or exact_match"
        ) from None
    # Its time limits raise signals, which belong to the main thread and to others.
    gold = parse(_as_latex(str(expected)), parsing_timeout=None)
    return bool(verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None))


def _as_latex(answer: str) -> str:
    return answer if "$" in answer or "\\boxed" in answer else f"${answer}$"


def constraints(text: str, expected: Any) -> bool:
    """All instructions on the form are followed, see :mod:`smol.evaluation.constraints`.

    Expected are two lists: the names of the instructions, and the arguments of each.
    """
    from smol.evaluation.constraints import follows

    lists = isinstance(expected, list | tuple) and [isinstance(x, list | tuple) for x in expected]
    if lists != [True, True] or len(expected[0]) != len(expected[1]):
        raise UserError(
            f"a task's answer is {shown(expected)}, expected two lists for metric constraints: "
            "names of instructions, and as many arguments"
        )
    return all(follows(text, *instruction) for instruction in zip(*expected, strict=True))


def generated_task(text: str, expected: Any) -> bool:
    """The answer of a generated task, given by its fields, as the task itself checks it."""
    from smol.data.corpora.chat_tasks import Task, check

    known = {field.name for field in fields(Task)}
    if not isinstance(expected, dict) or set(expected) != known:
        raise UserError(
            f"a task's answer is {shown(expected)}, expected a dictionary for metric "
            f"generated_task, of {', '.join(sorted(known))}"
        )
    return check(Task(**expected), text)


GRADERS: dict[str, Callable[[str, Any], bool]] = {
    grade.__name__: grade for grade in (exact_match, number, maths, constraints, generated_task)
}
