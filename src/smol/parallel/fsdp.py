"""Fully sharded data parallelism (FSDP2) of a decoder."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def shard_decoder(
    decoder: nn.Module, mesh: DeviceMesh, mixed_precision: torch.dtype | None = None
) -> None:
    """Shard a decoder's parameters over the ranks of a mesh, in place.

    Every block is a unit of its own, and the rest (embedding, final norm and head) is the root's.
    A unit is gathered for its forward pass and again for its backward pass. Parameters keep their
    dtype, and so do their gradients.

    Args:
        decoder: A :class:`smol.model.decoder.Decoder`; may be on the meta device.
        mesh: One-dimensional mesh of the data-parallel ranks.
        mixed_precision: Dtype in which gathered parameters are sent and used, such as
            ``torch.bfloat16``; gradients are then reduced in float32. None leaves both to the
            parameters' dtype.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=mixed_precision,
        reduce_dtype=None if mixed_precision is None else torch.float32,
    )
    for block in decoder.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # Not left gathered after the forward pass, which is torch's choice for the root: what is
    # gathered in validation would hide a later change of the shards from the next training step.
    fully_shard(decoder, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def local_part(tensor: Tensor) -> Tensor:
    """This process' part of a tensor, or all of one that is whole; detached, in the same memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
