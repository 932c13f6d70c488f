"""Weights alone, from a checkpoint or a decoder folder into a decoder."""

from pathlib import Path

import torch
from torch import nn

from smol.errors import UserError, nearest
from smol.model.io import stored_weights


@torch.no_grad()
def copy_weights(decoder: nn.Module, folder: str | Path) -> None:
    """Fill a decoder with the weights of a folder, tensor by tensor.

    Args:
        decoder: On a real device; its parameters may be sharded, each rank then keeps its part.
        folder: A checkpoint of this project, or a decoder folder.

    Raises:
        UserError: a weight is missing, left over, or of another shape.
    """
    stored = stored_weights(folder)
    parameters = dict(decoder.named_parameters())
    for name in stored.keys() - parameters.keys():
        raise UserError(
            f"{folder} holds '{name}', which the model lacks.{nearest(name, parameters)}"
        )
    for name, parameter in parameters.items():
        if name not in stored:
            raise UserError(f"{folder} lacks '{name}' of the model.{nearest(name, stored)}")
        if stored[name].shape != parameter.shape:
            raise UserError(
                f"'{name}' has shape {tuple(stored[name].shape)} in {folder}, "
                f"{tuple(parameter.shape)} in the model; make model.decoder equal to the run that "
                "the weights come from"
            )
        parameter.copy_(stored[name].read_like(parameter))
