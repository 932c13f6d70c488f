"""The settings that a text is continued with; no torch, so that a command line reads them fast."""

import sys
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from smol.errors import UserError

LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Sampling:
    """How a text is continued.

    The filters are applied in the order top_k, top_p, min_p, each to what the one before has left,
    as in transformers.

    Raises:
        UserError: If a value is of another type or out of range.
    """

    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Draw from so many of the likeliest tokens."""
    top_p: float | None = None
    """Draw from the smallest set that holds this much probability (Holtzman et al. 2019)."""
    min_p: float | None = None
    """Leave out tokens less likely than this share of the likeliest (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in prompt and text, multiplies negative ones (CTRL)."""
    max_new_tokens: int = 256
    """Length of the continuation at most."""
    stop: tuple[str, ...] = ()
    """Strings that end the text and are no part of it."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the text, besides the tokenizer's end-of-text token."""
    seed: int = 0
    """What is drawn is a function of the text so far and of this."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _tuple(self.stop))
        object.__setattr__(self, "stop_ids", _tuple(self.stop_ids))
        temperature, top_k, top_p, min_p = self.temperature, self.top_k, self.top_p, self.min_p
        penalty, most, seed = self.repetition_penalty, self.max_new_tokens, self.seed
        checks = {
            "temperature": (_real(temperature) and temperature >= 0, "a number, 0 or more"),
            "top_k": (
                top_k is None or (_whole(top_k) and top_k >= 1),
                "a whole number, at least 1, or null",
            ),
            "top_p": (
                top_p is None or (_real(top_p) and 0 < top_p <= 1),
                "0 < top_p <= 1, or null",
            ),
            "min_p": (
                min_p is None or (_real(min_p) and 0 <= min_p <= 1),
                "0 <= min_p <= 1, or null",
            ),
            "repetition_penalty": (_real(penalty) and penalty > 0, "more than 0; 1 is none"),
            "max_new_tokens": (_whole(most) and most >= 1, "a whole number, at least 1"),
            "stop": (all(isinstance(s, str) and s for s in self.stop), "strings, not empty"),
            "stop_ids": (all(map(_whole, self.stop_ids)), "whole numbers"),
            "seed": (_whole(seed) and seed >= 0, "a whole number, 0 or more"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise UserError(f"{name} is {getattr(self, name)!r}, expected {expected}.")


def _tuple(value: Any) -> tuple:
    many = isinstance(value, Collection) and not isinstance(value, str | bytes | dict)
    return tuple(value) if many else (value,)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= LARGEST
