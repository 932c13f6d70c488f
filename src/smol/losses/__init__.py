"""Losses as pure functions of tensors."""

from smol.losses.cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
