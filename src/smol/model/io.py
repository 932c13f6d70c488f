"""A decoder as a folder: ``decoder.json`` describes it, ``model.safetensors`` holds its weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from smol.errors import UserError
from smol.model.config import DecoderConfig, RopeConfig
from smol.model.decoder import Decoder
from smol.stored_tensors import (
    StoredTensor,
    file_name,
    is_stored,
    read_tensors,
    stored_tensors,
)

DESCRIPTION = "decoder.json"
PART = "model"  # of a folder's stored tensors
WEIGHTS = file_name(PART)
MODULE_PREFIX = "decoder."  # of the weights in a training checkpoint, which is a decoder folder too


def save_decoder(
    folder: str | Path, config: DecoderConfig, rope: RopeConfig, state_dict: Mapping[str, Tensor]
) -> None:
    """Write a decoder folder.

    Args:
        folder: Created where missing; its files of the same names are replaced.
        config: Shape and features.
        rope: Rotary embedding in use.
        state_dict: Whole tensors (not sharded) under the names of :class:`Decoder`.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in state_dict.items()}
    temporary = folder / f".{WEIGHTS}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / WEIGHTS)
    description = {"decoder": asdict(config), "rope": asdict(rope)}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def read_description(folder: str | Path) -> tuple[DecoderConfig, RopeConfig]:
    """Read what a decoder folder describes, without its weights.

    Raises:
        UserError: If ``folder`` holds no ``decoder.json``, or one that does not parse.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise UserError(
            f"no decoder in {folder}: {DESCRIPTION} is missing; "
            "a Hugging Face folder is imported with python src/convert.py import FOLDER OUT."
        )
    try:
        description = json.loads(path.read_text())
        return DecoderConfig(**description["decoder"]), RopeConfig(**description["rope"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not describe a decoder: {error}.") from error


def with_trained_context(rope: RopeConfig, folder: str | Path | None) -> RopeConfig:
    """Let YaRN stretch the context that a model was trained with.

    Args:
        rope: What the configuration says.
        folder: Decoder folder or checkpoint whose weights will be used, if any.

    Returns:
        ``rope``, with the folder's ``original_context`` where YaRN needs one and none is set.

    Raises:
        UserError: If the folder's description is missing or does not parse.
    """
    if rope.yarn_factor is None or rope.original_context is not None or folder is None:
        return rope
    _, trained = read_description(folder)
    return replace(rope, original_context=trained.original_context)


def load_decoder(
    folder: str | Path, device: str | torch.device = "cpu", attention: str = "sdpa"
) -> Decoder:
    """Build the decoder that a folder holds, in the dtype of its weights.

    Args:
        folder: Written by :func:`save_decoder`.
        device: Where to put it.
        attention: Name of the attention backend.

    Raises:
        UserError: If the folder is incomplete or its weights do not fit its description.
    """
    config, rope = read_description(folder)
    _require_weights(folder)
    weights = read_tensors(Path(folder), PART, str(device))
    state_dict = {name.removeprefix(MODULE_PREFIX): tensor for name, tensor in weights.items()}
    return assemble_decoder(config, rope, state_dict, device, attention)


def has_weights(folder: str | Path) -> bool:
    """Whether a folder holds weights, in one file or in shards: a decoder folder or checkpoint."""
    return is_stored(Path(folder), PART)


def stored_weights(folder: str | Path) -> dict[str, StoredTensor]:
    """List the weights of a decoder folder or a checkpoint under the names of :class:`Decoder`.

    Raises:
        UserError: If there are none, or their files cannot be read.
    """
    _require_weights(folder)
    weights = stored_tensors(Path(folder), PART)
    return {name.removeprefix(MODULE_PREFIX): tensor for name, tensor in weights.items()}


def assemble_decoder(
    config: DecoderConfig,
    rope: RopeConfig,
    state_dict: Mapping[str, Tensor],
    device: str | torch.device = "cpu",
    attention: str = "sdpa",
) -> Decoder:
    """Build a decoder around given weights, without copying them.

    Args:
        config: Shape and features.
        rope: Rotary embedding.
        state_dict: One tensor per parameter, on ``device``.
        device: Where buffers are put.
        attention: Name of the attention backend.

    Raises:
        UserError: If a weight is missing, unexpected or of another shape.
    """
    decoder = describe_decoder(config, rope, state_dict, attention)
    decoder.load_state_dict(state_dict, assign=True)
    decoder.rotary.to_empty(device=device)
    return decoder


def describe_decoder(
    config: DecoderConfig,
    rope: RopeConfig,
    weights: Mapping[str, Tensor | StoredTensor],
    attention: str = "sdpa",
) -> Decoder:
    """Build a decoder without weights, and check that the given ones are those that it needs.

    Args:
        config: Shape and features.
        rope: Rotary embedding.
        weights: One per parameter.
        attention: Name of the attention backend.

    Returns:
        The decoder, on the meta device.

    Raises:
        UserError: If a weight is missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        decoder = Decoder(config, rope, attention)
    expected = decoder.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            raise UserError(f"the weights lack {name}, which the described decoder has.")
        if name not in expected:
            raise UserError(f"the weights hold {name}, which the described decoder does not have.")
        if weights[name].shape != expected[name].shape:
            raise UserError(
                f"weight {name} has shape {tuple(weights[name].shape)}; the described decoder "
                f"expects {tuple(expected[name].shape)}."
            )
    return decoder


def _require_weights(folder: str | Path) -> None:
    if not has_weights(folder):
        raise UserError(f"{folder} holds no {WEIGHTS}; expected a checkpoint or a decoder folder")
