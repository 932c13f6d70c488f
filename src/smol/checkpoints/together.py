"""The processes of a sharded run save one checkpoint together."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from smol.checkpoints.format import Digests, write_checkpoint
from smol.errors import UserError, one_line

T = TypeVar("T")


def save_together(
    checkpoint: dict[str, Any], save: Callable[[Callable[[Path], Digests]], T]
) -> T | None:
    """Let the first process save a checkpoint, to which all contribute the shards that they hold.

    All processes call it with their checkpoints; where no tensor is sharded, those but the first
    need not, and do nothing. What ``save`` does with the files is the business of the first process
    alone. If any process fails, all do, and none waits for it.

    Args:
        checkpoint: As for :func:`~smol.checkpoints.format.write_checkpoint`.
        save: Called on the first process with a function that writes the payload into a folder,
            which all processes see under the same path.

    Returns:
        What ``save`` returned; None on the others.

    Raises:
        Exception: What ``save`` raised, and on the other processes one of the same words.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    if not any(isinstance(leaf, DTensor) for leaf in tree_leaves(checkpoint)):
        return save(partial(write_checkpoint, checkpoint=checkpoint)) if rank == 0 else None
    write = partial(write_checkpoint, checkpoint=checkpoint, rank=rank, on_all_ranks=on_all_ranks)
    if rank == 0:
        return _lead(write, save)
    return _follow(write)


def on_all_ranks(action: Callable[[], T]) -> list[T]:
    """Run something on every process.

    Returns:
        What came of it, by rank; it travels as pickles.

    Raises:
        Exception: The first one that a process raised, on all of them.
    """
    try:
        mine = action()
    except Exception as error:
        mine = _portable(error)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, mine)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


def _lead(write: Callable[[Path], Digests], save: Callable[[Callable[[Path], Digests]], T]) -> T:
    asked = False

    def write_with_others(folder: Path) -> Digests:
        nonlocal asked
        asked = True
        _broadcast(folder)
        return write(folder)

    error = None
    try:
        return save(write_with_others)
    except Exception as caught:
        error = caught
        raise
    finally:
        if not asked:
            _broadcast(None)
        _broadcast(None if error is None else _portable(error))


def _follow(write: Callable[[Path], Digests]) -> None:
    folder = _broadcast()
    if folder is not None:
        with suppress(Exception):  # the first process knows of it, and says what comes of it
            write(folder)
    if (error := _broadcast()) is not None:
        raise error


def _broadcast(value: Any = None) -> Any:
    """A value of the first process, on all of them."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _portable(error: Exception) -> Exception:
    """An error that can be told to other processes."""
    return error if isinstance(error, UserError | OSError) else RuntimeError(one_line(error))
