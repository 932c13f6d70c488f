"""Continuing a text token by token."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from smol.generation.sampling import sample


def last_logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """Logits of the last position only, ``(rows, vocab)`` float32."""
    return nn.functional.linear(hidden[:, -1], head_weight.to(hidden.dtype)).float()


@torch.no_grad()
def generate(
    decoder: nn.Module,
    prompt: Sequence[int],
    max_new_tokens: int,
    context: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    stop: Collection[int] = (),
    seed: int = 0,
) -> list[int]:
    """Continue a prompt, recomputing the last ``context`` tokens for each new one.

    Args:
        decoder: Called as :class:`smol.model.Decoder` is.
        prompt: At least one token.
        max_new_tokens: Length of the continuation at most.
        context: How many tokens the decoder sees at most.
        temperature: See :func:`~smol.generation.sampling.sample`.
        top_p: Likewise.
        stop: Tokens that end the text; they are not returned.
        seed: Seed of the sampling.

    Returns:
        The new tokens.
    """
    device = next(decoder.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens, new = list(prompt), []
    for _ in range(max_new_tokens):
        window = torch.tensor([tokens[-context:]], device=device)
        token = int(sample(decoder(window, head=last_logits), temperature, top_p, generator))
        if token in stop:
            break
        tokens.append(token)
        new.append(token)
    return new
