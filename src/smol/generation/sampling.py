"""Choosing the next token."""

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token from each row of logits.

    Args:
        logits: ``(rows, vocab)``.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Draw from the smallest set of tokens that holds this much probability (nucleus
            sampling, Holtzman et al. 2019).
        generator: Source of randomness.

    Returns:
        ``(rows,)`` int64.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    ordered, tokens = probabilities.sort(dim=-1, descending=True)
    # A token stays while those before it hold less than top_p: the likeliest one always does.
    ordered[ordered.cumsum(dim=-1) - ordered >= top_p] = 0
    choice = torch.multinomial(ordered, 1, generator=generator)
    return tokens.gather(-1, choice).squeeze(-1)
