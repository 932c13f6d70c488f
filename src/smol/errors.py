"""Errors that a user can cause, and how they are worded."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

SHOWN = 60  # characters of a value in a message


class UserError(ValueError):
    """A mistake in a file, a flag or the data, told in one line.

    The message says what is wrong, what was seen, what was expected and what to type. The command
    line prints it without a traceback and exits with status 2.
    """


class TemporaryError(UserError):
    """Something that may pass by itself, such as a store that is away, told in one line.

    The command line exits with status 75 (EX_TEMPFAIL of sysexits.h), after which launchers start
    the command again.
    """


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return `` Did you mean 'x'?`` for the known name closest to ``name``, or an empty string.

    Args:
        name: What was seen.
        known: What was expected.
        cutoff: How close it must be, from 0 for anything to 1 for ``name`` itself.
    """
    matches = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def one_line(error: Exception) -> str:
    """Return the type of an error of somebody else's, and a line of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def shown(value: Any) -> str:
    """Return a value, cut to a few dozen characters, and its type."""
    text = repr(value)
    text = text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
    return "null" if value is None else f"{text} ({type(value).__name__})"
