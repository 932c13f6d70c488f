"""From a path on the command line to something that writes."""

from pathlib import Path

import torch

from smol.errors import UserError
from smol.evaluation.language_model import LanguageModel, load_language_model
from smol.evaluation.model_folder import find_model
from smol.generation.engine import Generator
from smol.generation.inference_copy import can_pack


def load_generator(
    path: str | Path,
    tokenizer: str | Path | None = None,
    max_length: int | None = None,
    dtype: str = "auto",
) -> tuple[Generator, LanguageModel]:
    """Load a model to write with, on the GPU if there is one.

    Args:
        path: A run, a checkpoint, a decoder folder or a Hugging Face folder.
        tokenizer: Folder of the tokenizer, where it is not the one that goes with the model.
        max_length: Tokens of a text at most; by default what the model was trained with.
        dtype: One of :data:`~smol.serving.flags.DTYPES`; ``auto`` is the fastest that the device
            multiplies.

    Returns:
        The generator, which has a copy of the weights, and the model: tokenizer, template, limits.

    Raises:
        UserError: If something is missing or does not fit.
    """
    if max_length is not None and max_length < 2:
        raise UserError(f"max_length is {max_length}, expected at least 2.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_language_model(find_model(path, tokenizer), device, max_length=max_length)
    chosen = _best_dtype(device) if dtype == "auto" else getattr(torch, dtype)
    generator = Generator(model.decoder, model.tokenizer, model.max_length, chosen)
    model.decoder, model.fixed = generator.decoder, False  # one set of weights is enough
    return generator, model


def _best_dtype(device: torch.device) -> torch.dtype:
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast or can_pack(torch.bfloat16, device) else torch.float32
