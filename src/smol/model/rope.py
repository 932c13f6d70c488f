"""Rotary position embedding, with YaRN and a base that may change while training."""

import math

import torch
from torch import Tensor, nn

from smol.errors import UserError
from smol.model.config import RopeConfig

Rotation = tuple[Tensor, Tensor]
"""Cosines and signed sines, each ``(batch, time, 1, head_dim)``."""


def inverse_frequencies(head_dim: int, rope: RopeConfig) -> Tensor:
    """Angle in radians by which each pair of dimensions turns per position.

    The YaRN formulas are those of Peng et al. 2023 (https://arxiv.org/abs/2309.00071, section 3.2).

    Args:
        head_dim: Width of one attention head.
        rope: Base and scaling.

    Returns:
        ``(head_dim / 2,)``, float32, on the CPU.

    Raises:
        UserError: If YaRN is asked for without the context it stretches.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / (rope.theta ** (pairs / head_dim))
    if rope.yarn_factor is None:
        return frequencies
    if rope.original_context is None:
        raise UserError(
            f"rope yarn_factor is {rope.yarn_factor} but original_context is missing and no "
            "checkpoint says it; set it to the context of the training before, as in "
            "--model.rope.original_context 256"
        )

    def pair_turning(rotations: float) -> float:
        """Index of the pair that turns this many times within the original context."""
        wavelengths = rope.original_context / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_turning(rope.beta_fast)), 0)
    high = min(math.ceil(pair_turning(rope.beta_slow)), head_dim - 1)
    ramp = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low
    # Where both ends meet the ramp is a step; the small width only avoids dividing by zero.
    interpolated = (ramp / ((high - low) or 0.001)).clamp(0, 1)
    return frequencies / rope.yarn_factor * interpolated + frequencies * (1 - interpolated)


class RotaryEmbedding(nn.Module):
    """Computes the rotation of every position, once per forward for all layers.

    ``inv_freq`` is always float32 and is computed again whenever the module moves, so that neither
    ``decoder.bfloat16()`` nor ``decoder.to_empty(...)`` can spoil it.

    Args:
        head_dim: Width of one attention head.
        rope: Base and scaling.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int, rope: RopeConfig) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rope = rope
        self.register_buffer(
            "inv_freq", torch.empty(head_dim // 2, dtype=torch.float32), persistent=False
        )
        # The attention temperature of YaRN, applied to both queries and keys.
        self.scale = 0.1 * math.log(rope.yarn_factor) + 1.0 if rope.yarn_factor else 1.0
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Compute ``inv_freq`` from the current ``rope``, in place where possible."""
        frequencies = inverse_frequencies(self.head_dim, self.rope)
        if self.inv_freq.dtype == torch.float32:
            # In place, so that a compiled forward sees the new values without compiling again.
            self.inv_freq.copy_(frequencies)
        else:
            self.inv_freq = frequencies.to(self.inv_freq.device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.reset()
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Return the rotation of each position.

        Args:
            positions: ``(batch, time)``, integer.
            dtype: Of the result; the angles themselves are always float32.

        Returns:
            Cosines and signed sines for :func:`rotate`.
        """
        angles = positions.unsqueeze(-1).float() * self.inv_freq
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair ``(i, i + head_dim / 2)`` of dimensions by the angle of its position.

    Args:
        x: Queries or keys, ``(batch, time, heads, head_dim)``.
        rotation: Of the same positions, from :class:`RotaryEmbedding`.

    Returns:
        Same shape and dtype as ``x``.
    """
    cos, signed_sin = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, first), dim=-1) * signed_sin
