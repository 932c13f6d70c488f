"""Merging: one model out of several, by recipes in mergekit's vocabulary."""

from smol.merging.recipe import Recipe, load_recipe, parse_recipe
from smol.merging.stream import merge

__all__ = ["Recipe", "load_recipe", "merge", "parse_recipe"]
