"""The strategy of sharded training, with checkpoints that fit any number of processes."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed import ProcessGroup, ReduceOp
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer
from torchmetrics import Metric

from smol.errors import UserError
from smol.parallel.fsdp import shard_decoder
from smol.parallel.tensor_parallel import parallelize_decoder
from smol.stored_tensors import StoredTensor


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` with other defaults and other checkpoints.

    It runs on GPUs and, with gloo, on CPU processes. In the module's ``configure_model``,
    :meth:`shard` spreads the decoder over the processes: in groups of ``tensor_parallel_size`` that
    compute it together (neighbours, so that a group stays within a node), and over the
    data-parallel ranks, each of which is one process of every such group and has other data.

    Checkpoints are those of :class:`smol.checkpoints.SafeCheckpointIO`, which has to be among the
    trainer's plugins. Every rank writes the shards that it holds, and reads those that it needs,
    so a checkpoint moves freely between one process, DDP, and any number of ranks.

    Args:
        data_parallel_size: Ranks that have different data; None for all ranks that tensor
            parallelism leaves.
        tensor_parallel_size: Ranks that compute each block together, on the same data.
        shard_size: Data-parallel ranks that share a copy of the parameters (HSDP); None for all of
            them. With 1 each has its own, as in DDP.
        cpu_offload: Keep parameters, gradients and moments in the memory of the host.
        reshard_after_forward: Gather the parameters of a block anew for its backward pass; without
            it they stay from the forward pass on, which takes memory and spares traffic.
        **kwargs: Further arguments of ``ModelParallelStrategy``.

    Raises:
        UserError: A size is less than 1.
    """

    def __init__(
        self,
        data_parallel_size: int | None = None,
        tensor_parallel_size: int = 1,
        shard_size: int | None = None,
        cpu_offload: bool = False,
        reshard_after_forward: bool = True,
        **kwargs: Any,
    ) -> None:
        sizes = {
            "data_parallel_size": data_parallel_size,
            "tensor_parallel_size": tensor_parallel_size,
            "shard_size": shard_size,
        }
        for key, size in sizes.items():
            if size is not None and size < 1:
                raise UserError(f"{key} is {size}; expected 1 or more processes")
        super().__init__(
            data_parallel_size="auto" if data_parallel_size is None else data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=False,
            **kwargs,
        )
        self.shard_size, self.cpu_offload = shard_size, cpu_offload
        self.reshard_after_forward = reshard_after_forward

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    # -- processes -------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Join the other processes, and lay them out.

        Raises:
            UserError: The sizes do not fit the number of processes.
        """
        data, tensor = self._set_sizes(), self._tensor_parallel_size
        if self.cpu_offload and self.root_device.type == "cuda":
            # Norms of what is on the host are added up there.
            self._process_group_backend = self._process_group_backend or "cpu:gloo,cuda:nccl"
        super().setup_environment()
        if self.shard_size is not None:
            mesh = init_device_mesh(
                self.root_device.type,
                (data // self.shard_size, self.shard_size, tensor),
                mesh_dim_names=("replicate", "shard", "tensor_parallel"),
            )
            self._device_mesh = self.lightning_module._device_mesh = mesh
            self._data_parallel_mesh = mesh["replicate", "shard"]._flatten("data_parallel")
        else:
            self._data_parallel_mesh = self.device_mesh["data_parallel"]
        # Gathering along one dimension after the other is slower than at once, as it warns.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

    def _set_sizes(self) -> int:
        """Check the sizes; returns the number of data-parallel ranks."""
        processes, tensor = self.num_nodes * self.num_processes, self._tensor_parallel_size
        if processes % tensor:
            raise UserError(
                f"tensor_parallel_size is {tensor}, which does not divide the {processes} "
                "processes of the run; expected trainer.devices x trainer.num_nodes to be a "
                "multiple of it"
            )
        if self._data_parallel_size == "auto":
            self._data_parallel_size = processes // tensor
        data = self._data_parallel_size
        if data * tensor != processes:
            raise UserError(
                f"data_parallel_size {data} x tensor_parallel_size {tensor} is {data * tensor}, "
                f"but the run has {processes} processes; leave data_parallel_size out"
            )
        if data % (self.shard_size or 1):
            raise UserError(
                f"shard_size is {self.shard_size}, which does not divide the {data} data-parallel "
                "ranks; expected a divisor of them"
            )
        return data

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        mesh = self._data_parallel_mesh
        return {"num_replicas": mesh.size(), "rank": mesh.get_local_rank()}

    @property
    def data_parallel_group(self) -> ProcessGroup:
        """The processes that, between them, have each batch once."""
        return self._data_parallel_mesh.get_group()

    @property
    def reads_first(self) -> bool:
        """Whether no process before this one has the same batches."""
        return self.device_mesh["tensor_parallel"].get_local_rank() == 0

    def reduce(
        self, tensor: Any, group: Any = None, reduce_op: ReduceOp | str | None = "mean"
    ) -> Any:
        """Reduce over data-parallel ranks, so that a sum counts each datum once.

        What differs between any two processes is for ``group=torch.distributed.group.WORLD``.
        """
        return super().reduce(tensor, group or self.data_parallel_group, reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all processes, or any of them, say so."""
        votes = torch.tensor(float(decision), device=self.root_device)
        votes = float(super().reduce(votes, dist.group.WORLD, reduce_op="sum"))
        return votes == self.world_size if all else votes > 0

    # -- parameters ------------------------------------------------------------------------------

    @property
    def parameter_device(self) -> torch.device:
        """Where parameters are while they do not compute."""
        return torch.device("cpu") if self.cpu_offload else self.root_device

    def shard(self, decoder: nn.Module, context: int | None = None) -> None:
        """Spread a decoder over the processes, in place; each parameter becomes a ``DTensor``.

        Args:
            decoder: A :class:`smol.model.decoder.Decoder`, best on the meta device.
            context: Tokens per sequence that it will be trained on, where that is known.

        Raises:
            UserError: Its shape or the context does not divide by ``tensor_parallel_size``.
        """
        mesh, mixed = self.device_mesh, self.precision_plugin.precision == "bf16-mixed"
        if self._tensor_parallel_size > 1:
            parallelize_decoder(decoder, mesh["tensor_parallel"], context)
        shard_decoder(
            decoder,
            self._data_parallel_mesh if self.shard_size is None else mesh["replicate", "shard"],
            mixed_precision=torch.bfloat16 if mixed else None,
            cpu_offload=self.cpu_offload,
            reshard_after_forward=self.reshard_after_forward,
        )

    def setup(self, trainer: Any) -> None:
        for module in self.lightning_module.modules():
            if isinstance(module, Metric):
                module.process_group = self.data_parallel_group
        super().setup(trainer)

    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()
            return
        for module in self.model.modules():
            if not any(True for _ in module.parameters()):
                module.to(self.root_device)
        self.lightning_module._device = self.root_device  # where it finds its batches

    # -- checkpoints -----------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state; tensors stay sharded."""
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimiser's state; tensors stay sharded."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return optimizer.state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint from all ranks; the path is that of rank 0."""
        path = self.broadcast(filepath)
        self._sharded_io().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, but for weights and moments; the path is that of rank 0.

        Returns:
            The checkpoint, with a :class:`smol.stored_tensors.StoredTensor` for each of them.
        """
        return self._sharded_io().open_checkpoint(self.broadcast(checkpoint_path))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Read this rank's shards of the weights."""
        current = self.lightning_module.state_dict()
        state = {
            name: _read_like(value, current.get(name))
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Read this rank's shards of the moments."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            # After the optimiser's own hooks, which may have rearranged the parameters.
            hook = optimizer.register_load_state_dict_pre_hook(_read_optimizer_state)
            optimizer.load_state_dict(state)
            hook.remove()

    def _sharded_io(self) -> Any:
        if not hasattr(self.checkpoint_io, "open_checkpoint"):
            raise UserError(
                f"FSDP2Strategy cannot use {type(self.checkpoint_io).__name__}, which knows "
                "nothing of shards; add smol.checkpoints.SafeCheckpointIO to trainer.plugins"
            )
        return self.checkpoint_io


def _read_like(value: Any, target: Any) -> Any:
    """Read a stored tensor, as far as this rank needs it for ``target``."""
    return value.read_like(target) if isinstance(value, StoredTensor) else value


def _read_optimizer_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Read each moment like the parameter that stands at its position."""
    parameters = [item for group in optimizer.param_groups for item in group["params"]]
    indices = [item for group in state_dict["param_groups"] for item in group["params"]]
    state = {
        index: {k: _read_like(v, parameter) for k, v in state_dict["state"][index].items()}
        for index, parameter in zip(indices, parameters, strict=True)
        if index in state_dict["state"]
    }
    return {**state_dict, "state": state}
