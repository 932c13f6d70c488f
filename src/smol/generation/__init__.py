"""Writing text with a decoder."""

from smol.generation.engine import Generator, Stream
from smol.generation.row import Completion
from smol.generation.sampling import Sampling

__all__ = ["Completion", "Generator", "Sampling", "Stream"]
