"""Times what the training loop does, by what it tells its profiler."""

import time

import torch
from lightning.pytorch.profilers import Profiler

# Not training, though between two steps.
PAUSES = ("save_checkpoint", "sample_text", "evaluate_tasks")


class LoopTimer(Profiler):
    """Stands before the trainer's profiler and takes the time of what the loop says it does.

    Args:
        inner: The trainer's own, which is told everything.
        device: Whose work ends before the clock stops.
    """

    def __init__(self, inner: Profiler, device: torch.device):
        super().__init__()
        self.inner, self.device = inner, device
        self.paused_seconds = 0.0
        self._data_seconds = self._fetch_began = self._pause_began = 0.0
        self._pauses: set[str] = set()

    def read(self) -> tuple[float, float]:
        """Seconds of training, of any beginning, and those of them spent waiting for data."""
        return time.perf_counter() - self.paused_seconds, self._data_seconds

    def pause(self, reason: str) -> None:
        """Stop the clock; what is paused for waits for the device anyway."""
        if not self._pauses:
            synchronize(self.device)
            self._pause_began = time.perf_counter()
        self._pauses.add(reason)

    def resume(self, reason: str) -> None:
        if self._pauses == {reason}:
            self.paused_seconds += time.perf_counter() - self._pause_began
        self._pauses.discard(reason)

    def start(self, action_name: str) -> None:
        self.inner.start(action_name)
        if action_name.endswith("train_dataloader_next"):
            self.resume("validation")
            self._fetch_began = time.perf_counter()
        elif action_name in PAUSES:
            self.pause(action_name)

    def stop(self, action_name: str) -> None:
        self.inner.stop(action_name)
        if action_name.endswith("train_dataloader_next"):
            self._data_seconds += time.perf_counter() - self._fetch_began
        elif action_name in PAUSES:
            self.resume(action_name)

    def summary(self) -> str:
        return self.inner.summary()


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
