"""Wishes from outside for a checkpoint: signals, a file, the clock."""

import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from callbacks.parts.collectives import reduce_processes

FILE = "save"
LOOK_SECONDS = 1.0  # between two looks for it, which cost time
RETRY_SECONDS = 60.0  # after a save that failed, as on a full disk


class SaveRequests:
    """Collects wishes, and makes all processes hear of them at the same step.

    SIGUSR1 and a file ``save`` in the run folder ask for a checkpoint, SIGTERM for one and the end.
    In one process a wish is heard after the current step; several processes agree at every
    ``log_every_n_steps``-th step only, because it costs them an all-reduce. A wish lasts until it
    is fulfilled.

    Args:
        folder: The run folder.
        minutes: Time between checkpoints, by the clock of the first process; None for none.
    """

    def __init__(self, folder: Path, minutes: float | None = None):
        self.file, self.minutes = folder / FILE, minutes
        self._save = self._end = self._open = False
        self._later = 0.0  # time before which nothing is tried again
        self._before: dict[int, Any] = {}
        self._checked = self._saved = time.monotonic()

    def listen(self) -> None:
        """Take the signals over from whoever has them, Lightning as a rule."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._hear)

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def take(self, trainer: Trainer) -> tuple[bool, bool]:
        """Whether to save now, and whether to end the run; the same on all processes."""
        if trainer.world_size > 1 and trainer.global_step % trainer.log_every_n_steps:
            return False, False
        self._open, self._save = self._open or self._save, False
        save, end = self._open or (trainer.is_global_zero and self._is_due()), self._end
        save = end or (save and time.monotonic() >= self._later)
        if trainer.world_size > 1:
            wishes = torch.tensor([save, end], device=trainer.strategy.root_device).float()
            save, end = (reduce_processes(trainer, wishes, "sum") > 0).tolist()
        return save, end

    def answer(self, saved: bool, again: bool) -> None:
        """Say whether a checkpoint was taken; if not, whether to wish for it again, a little later.

        All processes call it.
        """
        if saved:
            self._open, self._saved = False, time.monotonic()
            self.file.unlink(missing_ok=True)
        elif again:
            self._open, self._later = True, time.monotonic() + RETRY_SECONDS

    def _is_due(self) -> bool:
        now = time.monotonic()
        if self.minutes is not None and now - self._saved >= 60 * self.minutes:
            return True
        if now - self._checked < LOOK_SECONDS:
            return False
        self._checked = now
        return self.file.exists()

    def _hear(self, number: int, frame: Any) -> None:
        if number == signal.SIGTERM:
            self._end = True
        else:
            self._save = True
