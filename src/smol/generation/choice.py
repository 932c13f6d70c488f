"""Choosing the next token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from smol.generation.sampling import Sampling

CANDIDATES = 256
"""Likeliest tokens that are looked at first; all are put in order where these do not decide."""


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
    if sampling.temperature < torch.finfo(torch.float32).tiny:  # 0, or soon divided by as 0
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
