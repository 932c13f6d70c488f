"""Training in float8: the products of the blocks in 8 bits, through torchao.

Micikevicius et al. 2022 (https://arxiv.org/abs/2209.05433). Weights, gradients and optimiser stay
as they are: each of the three products of a linear layer (output, gradient of the input, gradient
of the weight) scales its operands to the range of a float8 type, casts them, multiplies, and scales
back. A scale comes from the largest absolute value at hand, so rounding, though no gradient, passes
from any token of a batch to any other.

Embedding, head, norms and attention itself stay in the precision they had.
"""

import importlib.util
import logging
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import nn

from smol.errors import UserError, nearest
from smol.model.decoder import Decoder

Float8 = Literal["none", "tensorwise", "rowwise", "rowwise_with_gw_hp"]
"""What has a scale of its own: no float8 at all, a tensor, a row, or a row with the gradients of
weights left in the higher precision. The names are those of torchao's recipes, fastest first."""

MULTIPLE = 16
"""Of what the sizes of a product have to be, the number of tokens among them."""
CAPABILITY = (8, 9)
"""The first NVIDIA GPUs that multiply float8: Ada and Hopper."""


def convert_to_float8(
    decoder: Decoder,
    recipe: Float8,
    device: torch.device,
    *,
    parts: int = 1,
    emulate: bool = False,
) -> tuple[int, int]:
    """Replace the linear layers of a decoder's blocks by such that multiply in float8, in place.

    Parameters stay the same objects under the same names, so checkpoints do not change. It comes
    before blocks are compiled and before they are dealt to processes; without compilation the casts
    are passes over memory of their own.

    Args:
        decoder: May be on the meta device.
        recipe: What has a scale of its own; ``none`` converts nothing.
        device: Where the decoder will run.
        parts: Into how many parts tensor parallelism is going to split a width.
        emulate: Round to float8 and multiply in float32, which runs anywhere, and slowly.

    Returns:
        How many layers were converted, and how many the blocks have. A layer with a width, or a
        part of one, that is no multiple of 16 is left out.

    Raises:
        UserError: The recipe is unknown, the device cannot multiply float8, torchao is missing, or
            no layer has widths that fit.
    """
    if recipe not in get_args(Float8):
        raise UserError(
            f"float8 {recipe!r} is unknown; expected one of {', '.join(get_args(Float8))}."
            f"{nearest(recipe, get_args(Float8))}"
        )
    if recipe == "none":
        return 0, 0
    if not emulate:
        _require_hardware(recipe, device)
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            f"float8 {recipe!r} needs the package torchao, which is not installed; "
            "type pip install 'smol-lightning[gpu]' or use float8 none."
        )
    layers = [m for m in decoder.model.layers.modules() if isinstance(m, nn.Linear)]
    multiple = MULTIPLE * parts
    fitting = [layer for layer in layers if _fits(layer, multiple)]
    if not fitting:
        raise UserError(
            f"float8 {recipe!r} fits none of the {len(layers)} linear layers; expected widths that "
            f"are multiples of {multiple}, hidden_size is {decoder.config.hidden_size} and "
            f"intermediate_size {decoder.config.intermediate_size}; change them or use float8 none."
        )
    # Of its kernels, which are for other things than training, it warns that some do not load.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    finally:
        logging.disable(before)

    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    convert_to_float8_training(
        decoder.model.layers,
        module_filter_fn=lambda layer, name: _fits(layer, multiple),
        config=config,
    )
    return len(fitting), len(layers)


def check_tokens(tokens: int) -> None:
    """Refuse a number of tokens that a product in float8 cannot sum over.

    Raises:
        UserError: It is no multiple of 16.
    """
    if tokens % MULTIPLE:
        raise UserError(
            f"a micro-batch has {tokens} tokens, which float8 cannot multiply; expected a multiple "
            f"of {MULTIPLE}: change data.context_length or use model.float8 none."
        )


def _fits(layer: nn.Linear, multiple: int) -> bool:
    return layer.in_features % multiple == 0 and layer.out_features % multiple == 0


def _require_hardware(recipe: str, device: torch.device) -> None:
    """Refuse a device that cannot multiply float8, in one line."""
    wanted = "a GPU of compute capability 8.9 or newer (Ada, Hopper)"
    if device.type != "cuda":
        raise UserError(
            f"float8 {recipe!r} needs {wanted}, the model is on {device}; use float8 none."
        )
    if torch.version.hip is not None:
        return  # AMD numbers its GPUs otherwise
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(device), capability
        raise UserError(
            f"float8 {recipe!r} needs {wanted}, {name} has {major}.{minor}; use float8 none."
        )
