"""What goes wrong in training, made to order.

A kind is a function of a fault that is due, and of the module. It strikes at once, or returns a
context that strikes while it is open. None draws from torch's global random numbers.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import is_dataclass, replace
from math import inf, nan
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils._pytree import tree_map

from callbacks.parts.fault_hooks import (
    around_training_step,
    largest_file,
    on_gradient,
    on_output,
    set_first,
)
from smol.errors import UserError
from smol.parallel.fsdp import local_part

if TYPE_CHECKING:
    from callbacks.parts.faults import Fault

Context = AbstractContextManager[None]
TOKEN_FIELDS = ("tokens", "targets", "input_ids", "labels")

# -- the process and its machine -------------------------------------------------------------------


def sleep(fault: "Fault", module: LightningModule) -> None:
    time.sleep(1.0 if fault.seconds is None else fault.seconds)


def kill(fault: "Fault", module: LightningModule) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(fault: "Fault", module: LightningModule) -> Context:
    return largest_file(0)


def lose_device(fault: "Fault", module: LightningModule) -> None:
    if module.device.type == "cuda":
        torch._assert_async(torch.zeros((), device=module.device))
        torch.cuda.synchronize(module.device)  # fails, as will every later call
    error = getattr(torch, "AcceleratorError", RuntimeError)
    raise error("CUDA error: unspecified launch failure")


# -- what lies between two steps -------------------------------------------------------------------


def set_weight(fault: "Fault", module: LightningModule) -> None:
    _set_first(fault, (parameter for _, parameter in fault.parameters(module)))


def scale_weight(fault: "Fault", module: LightningModule) -> None:
    _, parameter = next(fault.parameters(module))
    local_part(parameter).mul_(fault.value)


def set_moment(fault: "Fault", module: LightningModule) -> None:
    """A moment is what an optimiser keeps of a parameter, and in its shape."""
    moments = (
        value
        for _, parameter in fault.parameters(module)
        for optimizer in module.trainer.optimizers
        for value in optimizer.state.get(parameter, {}).values()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    )
    _set_first(fault, moments)


def set_gradient(fault: "Fault", module: LightningModule) -> None:
    gradients = (parameter.grad for _, parameter in fault.parameters(module))
    _set_first(fault, (gradient for gradient in gradients if gradient is not None))


def _set_first(fault: "Fault", tensors: Iterable[Tensor]) -> None:
    """Strike the first tensor of which this process has a part."""
    part = next((local_part(tensor) for tensor in tensors if local_part(tensor).numel()), None)
    if part is None:
        raise UserError(f"fault {fault.kind} finds nothing to strike in this process and step")
    set_first(part, fault.value)


# -- what happens in one micro-batch ---------------------------------------------------------------


def scale_loss(fault: "Fault", module: LightningModule) -> Context:
    return _on_loss(module, lambda loss: loss * fault.value)


def scale_gradients(fault: "Fault", module: LightningModule) -> Context:
    def change(loss: Tensor) -> Tensor:
        loss.register_hook(lambda gradient: gradient * fault.value)
        return loss

    return _on_loss(module, change)


def _on_loss(module: LightningModule, change: Callable[[Tensor], Tensor]) -> Context:
    """A training step returns a loss, a mapping that has one, or None."""

    def wrap(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        if isinstance(output, Mapping):
            return {**output, "loss": change(output["loss"])}
        return output if output is None else change(output)

    return around_training_step(module, wrap)


def set_activation(fault: "Fault", module: LightningModule) -> Context:
    name = fault.submodule(module)
    return on_output(module, name, lambda output: set_first(output.clone(), fault.value))


def scale_activation(fault: "Fault", module: LightningModule) -> Context:
    return on_output(module, fault.submodule(module), lambda output: output * fault.value)


def set_micro_gradient(fault: "Fault", module: LightningModule) -> Context:
    name, _ = next(fault.parameters(module))
    return on_gradient(module, name, lambda gradient: set_first(gradient.clone(), fault.value))


def corrupt_batch(fault: "Fault", module: LightningModule) -> Context:
    """Corrupt what ``training_step`` is given, and not the batch, which a data set may keep."""
    random = torch.Generator().manual_seed(module.trainer.global_step)

    def noise(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype == torch.bool:
            return value
        if value.is_floating_point():
            return torch.randn(value.shape, generator=random).to(value) * fault.value * value.std()
        tokens = torch.randint(max(int(value.max()), 0) + 1, value.shape, generator=random)
        return torch.where(value < 0, value, tokens.to(value))  # what is not trained on stays so

    def wrap(step: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        fields = vars(batch) if is_dataclass(batch) else batch
        names = [name for name in TOKEN_FIELDS if isinstance(fields, Mapping) and name in fields]
        changed = {name: noise(fields[name]) for name in names}
        if not changed:
            batch = tree_map(noise, batch)
        else:
            batch = replace(batch, **changed) if is_dataclass(batch) else {**batch, **changed}
        return step(batch, *args, **kwargs)

    return around_training_step(module, wrap)


class Kind(NamedTuple):
    """A kind of fault.

    Attributes:
        strike: What it does.
        when: Between two steps, in a micro-batch, or when the gradients are reduced over the ranks.
        value: What it writes or multiplies with unless told otherwise; None if it does neither.
        names: What the target of the fault is the name of; None if it has no target.
    """

    strike: Callable[["Fault", LightningModule], Context | None]
    when: Literal["between", "micro", "reduced"] = "between"
    value: float | None = None
    names: Literal["parameter", "module"] | None = None


KINDS = {
    "nan_loss": Kind(scale_loss, "micro", nan),
    "inf_loss": Kind(scale_loss, "micro", inf),
    "loss_spike": Kind(scale_activation, "micro", 100.0, "module"),
    "nan_activation": Kind(set_activation, "micro", nan, "module"),
    "corrupt_batch": Kind(corrupt_batch, "micro", 10.0),
    "gradient_explosion": Kind(scale_gradients, "micro", 1e6),
    "nan_gradient_before_reduce": Kind(set_micro_gradient, "micro", nan, "parameter"),
    "nan_gradient": Kind(set_gradient, "reduced", nan, "parameter"),
    "inf_gradient": Kind(set_gradient, "reduced", inf, "parameter"),
    "nan_weight": Kind(set_weight, "between", nan, "parameter"),
    "scaled_weight": Kind(scale_weight, "between", 1.5, "parameter"),
    "nan_moment": Kind(set_moment, "between", nan, "parameter"),
    "slow_step": Kind(sleep),
    "kill": Kind(kill),
    "full_disk": Kind(fill_disk),
    "lost_device": Kind(lose_device),
}
