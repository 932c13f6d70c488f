"""Fully sharded data parallelism (FSDP2) of a decoder."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor


def shard_decoder(
    decoder: nn.Module,
    mesh: DeviceMesh,
    mixed_precision: torch.dtype | None = None,
    cpu_offload: bool = False,
    reshard_after_forward: bool = True,
) -> None:
    """Shard a decoder's parameters over the ranks of a mesh, in place.

    Every block is a unit of its own, and the rest (embedding, final norm and head) is the root's.
    A unit is gathered for its forward pass and again for its backward pass. Parameters keep their
    dtype, and so do their gradients. Parameters that tensor parallelism has dealt already become
    two-dimensional.

    Args:
        decoder: A :class:`smol.model.decoder.Decoder`; may be on the meta device.
        mesh: Mesh of the data-parallel ranks. With two dimensions, the ranks of the second share a
            copy of the parameters, and those of the first have copies of the same (HSDP).
        mixed_precision: Dtype in which gathered parameters are sent and used, such as
            ``torch.bfloat16``; gradients are then reduced in float32. None leaves both to the
            parameters' dtype.
        cpu_offload: Keep the shards in the memory of the host; they then have to be put there.
        reshard_after_forward: Whether blocks give what they have gathered away in between. They
            always do after a forward pass without gradients, such as that of validation.
    """
    pinned = mesh.device_type != "cpu"
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=mixed_precision,
            reduce_dtype=None if mixed_precision is None else torch.float32,
        ),
        "offload_policy": CPUOffloadPolicy(pinned) if cpu_offload else OffloadPolicy(),
    }
    for block in decoder.model.layers:
        fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(decoder, reshard_after_forward=True, **options)
    decoder.register_forward_hook(_reshard_unless_backward)


def _reshard_unless_backward(decoder: nn.Module, inputs: Any, output: Any) -> None:
    """Give away what no backward pass will.

    Left gathered by validation, parameters would hide a later change of their shards, such as a
    rollback's, from the next training step.
    """
    if not torch.is_grad_enabled():
        for module in decoder.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def local_part(tensor: Tensor) -> Tensor:
    """This process' part of a tensor, or all of one that is whole; detached, in the same memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
