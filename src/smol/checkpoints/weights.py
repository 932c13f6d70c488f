"""Weights alone, from a checkpoint or a decoder folder into a decoder."""

from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from smol.errors import UserError, nearest
from smol.model.io import MODULE_PREFIX, WEIGHTS


@torch.no_grad()
def copy_weights(decoder: nn.Module, folder: str | Path) -> None:
    """Fill a decoder with the weights of a folder, tensor by tensor.

    Args:
        decoder: On a real device; its parameters may be sharded, each rank then keeps its part.
        folder: A checkpoint of this project, or a decoder folder.

    Raises:
        UserError: a weight is missing, left over, or of another shape.
    """
    from safetensors import safe_open

    file = Path(folder, WEIGHTS)
    if not file.is_file():
        raise UserError(f"{folder} holds no {WEIGHTS}; expected a checkpoint or a decoder folder")
    with safe_open(file, framework="pt") as weights:
        stored = {name.removeprefix(MODULE_PREFIX): name for name in weights.keys()}  # noqa: SIM118
        parameters = dict(decoder.named_parameters())
        for name in stored.keys() - parameters.keys():
            raise UserError(
                f"{file} holds '{name}', which the model lacks.{nearest(name, parameters)}"
            )
        for name, parameter in parameters.items():
            if name not in stored:
                raise UserError(f"{file} lacks '{name}' of the model.{nearest(name, stored)}")
            value = weights.get_tensor(stored[name])
            if value.shape != parameter.shape:
                raise UserError(
                    f"'{name}' has shape {tuple(value.shape)} in {file}, {tuple(parameter.shape)} "
                    "in the model; make model.decoder equal to the run that the weights come from"
                )
            value = value.to(parameter.device, parameter.dtype)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(
                    value, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            parameter.copy_(value)
