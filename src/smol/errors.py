"""Errors that a user can cause, and how they are worded."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in a file, a flag or the data, told in one line.

    The message says what is wrong, what was seen, what was expected and what to type. The command
    line prints it without a traceback and exits with status 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the known name closest to ``name``, or an empty string."""
    matches = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""
