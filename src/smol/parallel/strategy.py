"""The strategy of sharded training, with checkpoints that fit any number of processes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from smol.errors import UserError


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` with other defaults and other checkpoints.

    It runs on GPUs and, with gloo, on CPU processes. The module shards itself in
    ``configure_model`` over ``self.device_mesh["data_parallel"]``.

    A checkpoint holds the whole state, gathered on rank 0 and handed to the trainer's
    ``CheckpointIO``. It is the checkpoint that one process would write, so it moves freely between
    one process, DDP, and FSDP2 on any number of ranks. On loading, every rank reads the folder and
    keeps its own shard.

    Args:
        data_parallel_size: Ranks that share a copy of the parameters; None for all ranks that
            tensor parallelism leaves.
        tensor_parallel_size: Must be 1.
        **kwargs: Further arguments of ``ModelParallelStrategy``.
    """

    def __init__(
        self, data_parallel_size: int | None = None, tensor_parallel_size: int = 1, **kwargs: Any
    ) -> None:
        if tensor_parallel_size != 1:
            raise UserError(
                f"tensor_parallel_size is {tensor_parallel_size}; the decoder has no plan for "
                "tensor parallelism yet: leave it at 1"
            )
        super().__init__(
            data_parallel_size="auto" if data_parallel_size is None else data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=False,
            **kwargs,
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        if self._data_parallel_size == "auto":
            world_size = self.num_nodes * self.num_processes
            self._data_parallel_size = world_size // self._tensor_parallel_size
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather the module's state; a collective, and empty on all ranks but the first."""
        return self._gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gather an optimiser's state; a collective, and empty on all ranks but the first."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return self._gathered(optimizer.state_dict())

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write a gathered checkpoint from rank 0."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, whole, on every rank; the path is that of rank 0."""
        path = self.broadcast(checkpoint_path)
        return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this rank's shards of the weights."""
        current = self.lightning_module.state_dict()
        state = {
            name: _sharded_like(value, current.get(name))
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's shards of the moments."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            # After the optimiser's own hooks, which may have rearranged the parameters.
            hook = optimizer.register_load_state_dict_pre_hook(_shard_optimizer_state)
            optimizer.load_state_dict(state)
            hook.remove()

    def _gathered(self, tree: Any) -> Any:
        """Make every sharded tensor of a tree whole, on the CPU of rank 0."""

        def gather(value: Any) -> Any:
            if isinstance(value, DTensor):
                value = value.full_tensor()
            if not isinstance(value, Tensor):
                return value
            return value.cpu() if self.is_global_zero else None

        gathered = tree_map(gather, tree)
        return gathered if self.is_global_zero else {}


def _sharded_like(value: Any, target: Any) -> Any:
    """Cut this rank's part of a whole tensor, without communication, if ``target`` is sharded."""
    if not isinstance(target, DTensor) or not isinstance(value, Tensor):
        return value
    if value.shape != target.shape:
        return value
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def _shard_optimizer_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Shard each moment like the parameter that stands at its position."""
    parameters = [item for group in optimizer.param_groups for item in group["params"]]
    indices = [item for group in state_dict["param_groups"] for item in group["params"]]
    state = {
        index: {k: _sharded_like(v, parameter) for k, v in state_dict["state"][index].items()}
        for index, parameter in zip(indices, parameters, strict=True)
        if index in state_dict["state"]
    }
    return {**state_dict, "state": state}
