"""Writing text with a decoder."""

from smol.generation.generate import generate
from smol.generation.sampling import sample

__all__ = ["generate", "sample"]
