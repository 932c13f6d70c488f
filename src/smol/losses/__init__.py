"""Losses as pure functions of tensors."""

from smol.losses.cross_entropy import linear_cross_entropy
from smol.losses.preference import PreferenceLoss

__all__ = ["PreferenceLoss", "linear_cross_entropy"]
