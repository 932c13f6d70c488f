"""The norm of gradients, whole or sharded."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The joint L2 norm of all gradients that there are; a scalar on the device.

    Where gradients are sharded it is that of the whole, and all ranks have to ask for it.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(
    parameters: Iterable[Tensor], max_norm: float | None, norm: Tensor | None = None
) -> Tensor:
    """Scale gradients so that their joint L2 norm is at most ``max_norm``; ``None`` only measures.

    Args:
        parameters: Whose gradients; those without one are passed over.
        max_norm: The largest norm that is left as it is.
        norm: The norm, where it is known.

    Returns:
        The norm before clipping, a scalar on the device.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = gradient_norm(parameters) if norm is None else norm
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
