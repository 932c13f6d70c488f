"""From tokens to text, piece by piece."""

from collections.abc import Sequence
from typing import Protocol

UNFINISHED = "\ufffd"  # a decoder's sign for bytes that are no character, or not yet


class Decodes(Protocol):
    """The part of a tokenizer that writing needs."""

    eos_id: int

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a sequence of ids."""


class TextStream:
    """Decodes tokens one by one and ends at the first of some strings.

    What could still change is held back: the bytes of an unfinished character, and the beginning
    of a string to stop at.

    Args:
        tokenizer: Decodes.
        stop: Strings that end the text.

    Attributes:
        text: What is certain so far; it only grows.
    """

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.text = ""
        self._tokens: list[int] = []
        self._begin, self._read = 0, 0  # of the tokens that give context, and of the unread ones
        self._pending = ""

    def push(self, token: int) -> bool:
        """Add a token; return whether the text ends at a stop string."""
        self._tokens.append(token)
        new = self._unread()
        if new.endswith(UNFINISHED):
            return False
        # Some tokens lose a space at the beginning of a text, so the window keeps one piece.
        self._begin, self._read = self._read, len(self._tokens)
        return self._add(new)

    def finish(self) -> None:
        """Add what was held back, as nothing follows."""
        if self._read < len(self._tokens) and self._add(self._unread()):
            return
        self.text += self._pending
        self._pending = ""

    def _unread(self) -> str:
        before = self.tokenizer.decode(self._tokens[self._begin : self._read])
        return self.tokenizer.decode(self._tokens[self._begin :])[len(before) :]

    def _add(self, new: str) -> bool:
        pending = self._pending + new
        ends = [place for stop in self.stop if (place := pending.find(stop)) >= 0]
        held = max((overlap(pending, stop) for stop in self.stop), default=0)
        end = min(ends, default=len(pending) - held)
        self.text += pending[:end]
        self._pending = "" if ends else pending[end:]
        return bool(ends)


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
