"""What a run needs to go back to where it was, kept in the memory of the host."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor

from smol.modules.steps import move_step_count
from smol.parallel.fsdp import local_part


class Clock:
    """All of a run's state that is not a tensor: step count, schedules, options, random states.

    Attributes:
        step: Completed optimiser steps.
        position: Tokens read before it; ``None`` if the data does not count them.
    """

    def __init__(self, trainer: Any):
        self.step = trainer.global_step
        self.position = getattr(getattr(trainer.datamodule, "loader", None), "position", None)
        self._random = _collect_rng_states()
        self._scaler = deepcopy(trainer.precision_plugin.state_dict())
        self._schedules = [deepcopy(c.scheduler.state_dict()) for c in trainer.lr_scheduler_configs]
        self._options = [_options(optimizer) for optimizer in trainer.optimizers]

    def restore(self, trainer: Any) -> None:
        """Go back to it, but for the data: whoever goes back decides what to read next."""
        for optimizer, options in zip(trainer.optimizers, self._options, strict=True):
            for group, option in zip(optimizer.param_groups, options, strict=True):
                group.update(deepcopy(option))
        for config, state in zip(trainer.lr_scheduler_configs, self._schedules, strict=True):
            config.scheduler.load_state_dict(deepcopy(state))
        trainer.precision_plugin.load_state_dict(deepcopy(self._scaler))
        _set_rng_states(self._random)
        move_step_count(trainer, self.step - trainer.global_step)


class Snapshot:
    """A :class:`Clock` with the weights, buffers and moments of its time.

    Sharded tensors are kept as this rank's shards, so taking and restoring need no communication;
    all ranks do either at the same step, between two steps.
    """

    def __init__(self, trainer: Any, pl_module: Any):
        self._tensors: dict[Any, Tensor] = {}
        self.take(trainer, pl_module)

    def take(self, trainer: Any, pl_module: Any) -> None:
        """Copy the present state, into the memory of the one before."""
        self.clock = Clock(trainer)
        present = dict(_state(trainer, pl_module))
        self._finite = _finite_by_device(present.values())
        self._tensors = {key: _to_host(t, self._tensors.get(key)) for key, t in present.items()}

    def is_finite(self) -> bool:
        """Whether every floating-point tensor was finite on this rank; waits for the device."""
        return all(self._finite.values())

    @torch.no_grad()
    def restore(self, trainer: Any, pl_module: Any) -> None:
        """Put everything back, in place; moments that did not exist then are forgotten."""
        for i, optimizer in enumerate(trainer.optimizers):
            for parameter, state in list(optimizer.state.items()):
                if any((i, parameter, name) not in self._tensors for name in state):
                    del optimizer.state[parameter]
        for key, tensor in _state(trainer, pl_module):
            tensor.copy_(self._tensors[key])
        self.clock.restore(trainer)


def _state(trainer: Any, pl_module: Any) -> Iterator[tuple[Any, Tensor]]:
    """Every tensor of the state by a key, this rank's part of it.

    Raises:
        TypeError: an optimiser keeps something else than tensors.
    """
    for name, parameter in pl_module.named_parameters():
        yield name, local_part(parameter)
    for name, buffer in pl_module.named_buffers():
        yield name, local_part(buffer)
    for i, optimizer in enumerate(trainer.optimizers):
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if not isinstance(value, Tensor):
                    kind = f"{type(optimizer).__name__} keeps '{name}' as {type(value).__name__}"
                    raise TypeError(f"{kind}; only optimisers whose state is tensors can go back")
                yield (i, parameter, name), local_part(value)


def _finite_by_device(tensors: Iterable[Tensor]) -> dict[torch.device, Tensor]:
    """Whether all that is floating-point on a device is finite there, a boolean scalar on it."""
    largest = defaultdict(list)
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            # The largest magnitude, since it is not a number when any element is none.
            largest[tensor.device].append(torch.linalg.vector_norm(tensor, torch.inf).float())
    return {device: torch.stack(norms).isfinite().all() for device, norms in largest.items()}


def _to_host(tensor: Tensor, memory: Tensor | None) -> Tensor:
    if memory is None:
        memory = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return memory.copy_(tensor, non_blocking=tensor.is_cuda)


def _options(optimizer: Any) -> list[dict[str, Any]]:
    """The hyper-parameters of each group."""
    return [
        deepcopy({key: value for key, value in group.items() if key != "params"})
        for group in optimizer.param_groups
    ]
