"""One line that says how the run is doing."""

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class ProgressLine(Callback):
    """Prints step, loss, tokens per second and time left.

    On a terminal the line renews itself; elsewhere a new one is printed now and then.

    .. code-block:: yaml

        callbacks:
          progress:
            class_path: callbacks.ProgressLine
            init_args: {seconds: 10}

    Args:
        seconds: Seconds between lines where there is no terminal.
    """

    order = 300

    def __init__(self, seconds: float = 10.0):
        self.seconds = seconds
        self._begin = self._printed = (0.0, 0, 0)  # clock, step, tokens

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin = self._printed = (time.monotonic(), trainer.global_step, self._tokens(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, step = time.monotonic(), trainer.global_step
        wait = 0.5 if sys.stdout.isatty() else self.seconds
        if step == self._printed[1] or now - self._printed[0] < wait:
            return
        self._print(trainer, now)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._begin[1]:
            self._print(trainer, time.monotonic(), whole=True)
            if sys.stdout.isatty() and trainer.is_global_zero:
                print()

    def _print(self, trainer: Trainer, now: float, whole: bool = False) -> None:
        since = self._begin if whole else self._printed
        self._printed = (now, trainer.global_step, self._tokens(trainer))
        if not trainer.is_global_zero:
            return
        _, step, tokens = self._printed
        rate = (tokens - since[2]) / max(now - since[0], 1e-9)
        steps_per_second = (step - since[1]) / max(now - since[0], 1e-9)
        parts = [
            f"step {step:,}/{trainer.max_steps:,}" if trainer.max_steps > 0 else f"step {step:,}"
        ]
        if "train/loss" in trainer.callback_metrics:
            parts.append(f"loss {float(trainer.callback_metrics['train/loss']):.3f}")
        if tokens:
            parts.append(f"{rate:,.0f} tokens/s")
        if trainer.max_steps > step and steps_per_second > 0:  # not after a rollback
            parts.append(f"{_clock((trainer.max_steps - step) / steps_per_second)} left")
        elif whole:
            parts.append(f"took {_clock(now - self._begin[0])}")
        line = "  ".join(parts)
        print(f"\r{line:<78}" if sys.stdout.isatty() else line, flush=True, end=_end())

    @staticmethod
    def _tokens(trainer: Trainer) -> int:
        return getattr(getattr(trainer.datamodule, "loader", None), "position", 0)


def _end() -> str:
    return "" if sys.stdout.isatty() else "\n"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
