"""Which checkpoints may go: a rule without side effects, and the pins that stand above it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from smol.checkpoints.store import CheckpointInfo, FsspecStore, order
from smol.errors import UserError

PIN_FILE = "PINNED"


@dataclass(frozen=True)
class Retention:
    """Keeps the newest checkpoints, and every so many steps one for good.

    Args:
        keep: How many verified ones to keep, at least 2, so that a damaged one can be replaced.
        keep_every: Checkpoints whose step is a multiple of it stay for good; None for none.
    """

    keep: int = 2
    keep_every: int | None = None

    def __post_init__(self) -> None:
        if self.keep < 2:
            raise UserError(
                f"keep is {self.keep}; at least 2, so that a damaged one can be replaced"
            )
        if self.keep_every is not None and self.keep_every < 1:
            raise UserError(f"keep_every is {self.keep_every}, expected 1 or more optimiser steps")

    def removable(
        self,
        infos: Sequence[CheckpointInfo],
        is_sound: Callable[[CheckpointInfo], bool],
        is_protected: Callable[[CheckpointInfo], bool] = lambda info: False,
    ) -> list[CheckpointInfo]:
        """Say which checkpoints may go.

        Only what is older than the newest ``keep`` sound ones may. One that is damaged neither
        counts nor is a reason to delete another.

        Args:
            infos: Committed checkpoints, in any order.
            is_sound: Whether one passes verification; asked only where the answer matters.
            is_protected: Whether one must stay: pinned, resumed from, or being read or written.

        Returns:
            Those that may go, oldest first.
        """
        if len(infos) <= self.keep:
            return []
        found, old = 0, []
        for info in sorted(infos, key=order, reverse=True):
            if found < self.keep:
                found += is_sound(info)
            else:
                old.append(info)
        return [info for info in reversed(old) if not self._lasts(info) and not is_protected(info)]

    def _lasts(self, info: CheckpointInfo) -> bool:
        return self.keep_every is not None and info.manifest.step % self.keep_every == 0


def pin(store: FsspecStore, key: str) -> None:
    """Keep a checkpoint until :func:`unpin`; its own files are not changed."""
    store.fs.pipe_file(f"{store.root}/{key}/{PIN_FILE}", b"")


def unpin(store: FsspecStore, key: str) -> None:
    """Take the pin away; nothing happens if there is none."""
    if is_pinned(store, key):
        store.fs.rm_file(f"{store.root}/{key}/{PIN_FILE}")


def is_pinned(store: FsspecStore, key: str) -> bool:
    """Whether a checkpoint is pinned."""
    return store.fs.exists(f"{store.root}/{key}/{PIN_FILE}")
