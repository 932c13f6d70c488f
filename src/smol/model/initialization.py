"""Initial weights, equal for every way of sharding, and a check of what they became."""

import zlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from smol.errors import UserError
from smol.model.decoder import Decoder, RMSNorm
from smol.model.rope import RotaryEmbedding

STD_TOLERANCE = 0.2
"""How far, relatively, the spread of a weight may lie from the intended one."""
LARGE = 1000
"""Elements from which a sample tells its standard deviation to well within the tolerance."""


@torch.no_grad()
def init_weights(decoder: Decoder, std: float | None = None, seed: int | None = None) -> None:
    """Fill all parameters and buffers: norms with one, biases with zero, the rest normally.

    Each parameter draws from a generator of its own, seeded by ``seed`` and its name. So the values
    do not depend on how the decoder is sharded, and a parameter added elsewhere changes no other.
    A decoder built on the meta device is materialised with ``decoder.to_empty(device=...)`` first.

    Args:
        decoder: On a real device; its parameters may be sharded (DTensor).
        std: Standard deviation; ``None`` means ``decoder.config.init_std``.
        seed: ``None`` means the seed of torch's global generator.
    """
    std = decoder.config.init_std if std is None else std
    seed = torch.initial_seed() if seed is None else seed
    norms = _norm_weights(decoder)
    for name, parameter in decoder.named_parameters():
        if parameter.is_meta:
            raise UserError(
                f"parameter {name} is on the meta device and cannot be initialised; "
                "call decoder.to_empty(device=...) before init_weights."
            )
        if name in norms:
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            _fill_normal(parameter, std, seed ^ zlib.crc32(name.encode()))
    for module in decoder.modules():
        if isinstance(module, RotaryEmbedding):
            module.reset()


def _norm_weights(decoder: nn.Module) -> set[str]:
    """Names of the weights of all norms."""
    return {
        f"{name}.weight" for name, module in decoder.named_modules() if isinstance(module, RMSNorm)
    }


def _fill_normal(parameter: Tensor, std: float, seed: int) -> None:
    generator = torch.Generator(parameter.device).manual_seed(seed)
    whole = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
    whole.normal_(0.0, std, generator=generator)
    if isinstance(parameter, DTensor):
        # Every rank drew the same numbers and keeps its share of them; nothing is sent.
        whole = distribute_tensor(
            whole, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(whole)


@torch.no_grad()
def check_initialization(decoder: Decoder, std: float | None = None) -> None:
    """Verify freshly initialised weights; to be called on every rank.

    Args:
        decoder: After :func:`init_weights`; its parameters may be sharded (DTensor).
        std: Intended standard deviation; ``None`` means ``decoder.config.init_std``.

    Raises:
        UserError: Naming the first parameter that is not finite, is all zero where it must not be,
            or whose standard deviation is off by more than a fifth.
    """
    std = decoder.config.init_std if std is None else std
    norms = _norm_weights(decoder)
    for name, parameter in decoder.named_parameters():
        total, squares = _sums(parameter)
        mean = total / parameter.numel()
        spread = max(squares / parameter.numel() - mean**2, 0.0) ** 0.5
        if not spread < float("inf"):
            raise UserError(f"parameter {name} is not finite after initialisation.")
        if name.endswith("bias"):
            if squares != 0:
                raise UserError(f"parameter {name} is a bias and should start at zero.")
        elif name in norms:
            if mean != 1 or spread > 1e-3:
                raise UserError(f"parameter {name} is a norm and should start at one.")
        elif squares == 0:
            raise UserError(f"parameter {name} is all zero after initialisation.")
        elif parameter.numel() >= LARGE and abs(spread / std - 1) > STD_TOLERANCE:
            raise UserError(
                f"parameter {name} has standard deviation {spread:.2g} after initialisation; "
                f"expected {std:.2g}."
            )


def _sums(parameter: Tensor) -> tuple[float, float]:
    """Sum and sum of squares over all shards."""
    values = parameter.float()
    sums = torch.stack([values.sum(), values.square().sum()])
    return tuple((sums.full_tensor() if isinstance(sums, DTensor) else sums).tolist())
