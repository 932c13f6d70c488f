"""Choosing the next token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smol.errors import UserError

CANDIDATES = 256
"""Likeliest tokens that are looked at first; all are put in order where these do not decide."""


@dataclass(frozen=True)
class Sampling:
    """How a text is continued.

    The filters are applied in the order top_k, top_p, min_p, each to what the one before has left,
    as in transformers.

    Raises:
        UserError: If a number is out of range.
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
        object.__setattr__(self, "stop", _tuple(self.stop, str))
        object.__setattr__(self, "stop_ids", _tuple(self.stop_ids, int))
        checks = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1, or null"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "0 < top_p <= 1, or null"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "0 <= min_p <= 1, or null"),
            "repetition_penalty": (self.repetition_penalty > 0, "more than 0; 1 is none"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "stop": (all(self.stop), "strings that are not empty"),
            "seed": (self.seed >= 0, "0 or more"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise UserError(f"{name} is {getattr(self, name)!r}, expected {expected}.")


def _tuple(value: str | int | Sequence, single: type) -> tuple:
    return (value,) if isinstance(value, single) else tuple(value)


def choose(logits: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """Choose a token for each row of logits; it depends on nothing but the row.

    Args:
        logits: ``(rows, vocab)``, float32, penalties applied.
        samplings: Settings of each row.
        uniforms: For each row, a number drawn uniformly from [0, 1).

    Returns:
        ``(rows,)`` int64.
    """
    tokens = logits.new_empty(len(logits), dtype=torch.long)
    places = torch.tensor(uniforms, dtype=torch.float64, device=logits.device).unsqueeze(1)
    groups: dict[tuple, list[int]] = {}
    for row, s in enumerate(samplings):
        groups.setdefault((s.temperature, s.top_k, s.top_p, s.min_p), []).append(row)
    for rows in groups.values():
        # Not copied where all rows want the same.
        index = slice(None) if len(groups) == 1 else torch.tensor(rows, device=logits.device)
        tokens[index] = sample(logits[index], samplings[rows[0]], places[index])
    return tokens


def sample(
    logits: Tensor, sampling: Sampling, uniforms: Tensor, candidates: int = CANDIDATES
) -> Tensor:
    """Draw a token from each row of logits, by inverting the cumulative distribution.

    Args:
        logits: ``(rows, vocab)``.
        sampling: Temperature and filters.
        uniforms: ``(rows, 1)`` float64, drawn uniformly from [0, 1).
        candidates: Likeliest tokens to look at first; it changes the time, not the result.

    Returns:
        ``(rows,)`` int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    top_k, top_p, min_p = sampling.top_k, sampling.top_p, sampling.min_p
    logits = logits.float()
    # Relative to the likeliest token, as min_p is.
    weights = ((logits - logits.amax(-1, keepdim=True)) / sampling.temperature).exp().double()
    if top_k is top_p is min_p is None:
        return _invert(weights, uniforms).squeeze(1)
    vocab = logits.shape[1]
    held = weights.sum(-1, keepdim=True)
    weights, tokens = weights.topk(min(top_k or candidates, vocab), dim=-1)
    cumulative = weights.cumsum(-1)
    if top_k is not None:
        held = cumulative[:, -1:]
    kept = torch.ones_like(weights, dtype=torch.bool)
    if top_p is not None:
        # A token stays while those before it hold less than top_p: the likeliest one always does.
        kept &= cumulative - weights < top_p * held
    if min_p is not None:
        kept &= weights >= min_p
    chosen = tokens.gather(1, _invert(weights * kept, uniforms)).squeeze(1)
    if top_k is None and weights.shape[1] < vocab and (more := kept[:, -1]).any():
        chosen[more] = sample(logits[more], sampling, uniforms[more], vocab)
    return chosen


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The columns where the cumulative weights pass a share of their sum; ``(rows, 1)``."""
    cumulative = weights.cumsum(-1)
    return torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True).clamp_(
        max=weights.shape[1] - 1
    )


def penalize_repetition(logits: Tensor, text: Sequence[int], penalty: float) -> None:
    """Make the tokens of a text less likely, in place (Keskar et al. 2019, section 4.1).

    Args:
        logits: ``(vocab,)``.
        text: Tokens.
        penalty: Divides their positive logits and multiplies the negative ones.
    """
    seen = torch.tensor(text, device=logits.device)
    values = logits[seen]
    logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
