"""Ways into a training step and its process, for tests and drills.

Each is a context. What it puts into the module acts once, and is gone when the context closes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from smol.errors import UserError

Change = Callable[[Tensor], Tensor]


@contextmanager
def around_training_step(module: LightningModule, wrap: Callable[..., Any]) -> Iterator[None]:
    """Let ``wrap(training_step, batch, ...)`` stand in for the next call of ``training_step``."""
    original, own = module.training_step, vars(module).get("training_step")
    waiting = True

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal waiting
        if not waiting:
            return original(*args, **kwargs)
        waiting = False
        return wrap(original, *args, **kwargs)

    module.training_step = step
    try:
        yield
    finally:
        del module.training_step
        if own is not None:
            module.training_step = own


@contextmanager
def on_output(module: LightningModule, name: str, change: Change) -> Iterator[None]:
    """Change the first floating-point tensor that a submodule returns in its next call.

    Raises:
        UserError: The context closes, and the submodule was not called or returned none.
    """
    waiting = True

    def hook(submodule: nn.Module, inputs: Any, output: Any) -> Any:
        nonlocal waiting
        leaves, form = tree_flatten(output)
        for index, leaf in enumerate(leaves):
            if waiting and isinstance(leaf, Tensor) and leaf.is_floating_point():
                waiting = False
                leaves[index] = _change_part(leaf, change)
        return tree_unflatten(leaves, form)

    handle = module.get_submodule(name).register_forward_hook(hook)
    try:
        with _uncompiled(module):
            yield
    finally:
        handle.remove()
    if waiting:
        raise UserError(
            f"the fault in '{name}' did not strike: training_step did not call that module, or it "
            "returned no floats; name another target"
        )


@contextmanager
def on_gradient(module: LightningModule, name: str, change: Change) -> Iterator[None]:
    """Change the gradient of a parameter in the next backward pass, before ranks are reduced.

    Where FSDP2 has sharded the parameter, another one, the whole, takes its place while its module
    runs. That one gets the hook, so the gradient has the shape of the whole in any strategy, or of
    what tensor parallelism gave to this process.

    Raises:
        UserError: The context closes, and no gradient has come.
    """
    owner_name, _, attribute = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    waiting, hooks = True, []

    def hook(gradient: Tensor) -> Tensor | None:
        nonlocal waiting
        if not waiting:
            return None
        waiting = False
        return _change_part(gradient, change)

    sharded = getattr(owner, attribute)

    def find(*_: Any) -> None:
        parameter = getattr(owner, attribute)
        if not hooks and (parameter is not sharded or not isinstance(parameter, DTensor)):
            hooks.append(parameter.register_hook(hook))

    find()
    finders = []
    if not hooks:  # it becomes whole when its own module begins, or one around it
        parts = owner_name.split(".")
        around = [module.get_submodule(".".join(parts[: n + 1])) for n in range(len(parts))]
        finders = [part.register_forward_pre_hook(find) for part in around]
    try:
        with _uncompiled(module):
            yield
    finally:
        for handle in hooks + finders:
            handle.remove()
    if waiting:
        raise UserError(f"the fault in '{name}' did not strike: it got no gradient; name another")


def _change_part(tensor: Tensor, change: Change) -> Tensor:
    """Change a tensor, or this process' part of one that is shared between several."""
    if not isinstance(tensor, DTensor):
        return change(tensor)
    mesh, placements = tensor.device_mesh, tensor.placements
    shape = {"shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(change(tensor.to_local()), mesh, placements, run_check=False, **shape)


@contextmanager
def _uncompiled(module: nn.Module) -> Iterator[None]:
    """Run what ``Module.compile`` compiled as it was written, for compiled code sees no hook."""
    compiled = [(m, m._compiled_call_impl) for m in module.modules() if m._compiled_call_impl]
    for part, _ in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, call in compiled:
            part._compiled_call_impl = call


@contextmanager
def largest_file(size: int | None) -> Iterator[None]:
    """Limit the bytes of a file that this process writes to; None: to what the system allows it.

    Writing beyond fails with ``EFBIG``; Python ignores the signal that comes with it.
    """
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def set_first(tensor: Tensor, value: float) -> Tensor:
    """Write the first element in place; returns the tensor."""
    tensor[(0,) * tensor.ndim] = value
    return tensor
