"""How the machine is doing."""

import time
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.events import record
from callbacks.parts.collectives import reduce_processes
from callbacks.parts.sampler import THROTTLED, Sampler, open_gpu
from smol.errors import UserError


class HardwareMonitor(Callback):
    """Logs the state of GPU, processor, memory and disk; events when something is wrong with them.

    A thread samples, so that no step waits; the newest sample is logged: ``hardware/cpu_percent``,
    ``ram_percent``, ``disk_free_gigabytes`` and, of the first process' NVIDIA GPU,
    ``gpu_percent``, ``gpu_memory_gigabytes``, ``gpu_celsius``, ``gpu_watts`` (``gpu_throttle`` has
    the bits of all samples since the last log). Events, one when a fault begins and one when it
    ends (``active`` true, then false): ``throttled`` (the GPU of any process is hot, braked or does
    not answer), ``disk_nearly_full`` and ``throughput_out_of_band``, which needs the callback
    ``Throughput``.

    .. code-block:: yaml

        callbacks:
          hardware:
            class_path: callbacks.HardwareMonitor
            init_args: {seconds: 10, disk_gigabytes: 10}

    Args:
        seconds: Between two samples.
        disk_gigabytes: The disk of the run folder is nearly full with less than that free.
        band: Least and largest tokens per second (steps per second where there are no tokens). By
            default half and twice the median of this start of the run, forgotten when the shape of
            the batches changes.
        patience: Seconds that throughput must be outside without a break.
        nvml: The module ``pynvml`` or one like it; by default imported when training on CUDA.
    """

    order = 200

    def __init__(
        self,
        seconds: float = 10.0,
        disk_gigabytes: float = 2.0,
        band: tuple[float, float] | None = None,
        patience: float = 60.0,
        nvml: Any = None,
    ):
        if seconds <= 0:
            raise UserError(f"HardwareMonitor seconds is {seconds:g}, expected more than 0")
        if band is not None and not 0 <= band[0] < band[1]:
            raise UserError(f"HardwareMonitor band is {list(band)}, expected [least, largest]")
        self.seconds, self.disk_gigabytes, self.nvml = seconds, disk_gigabytes, nvml
        self.band = ThroughputBand(band, patience)
        self._sampler: Sampler | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        gpu = open_gpu(self.nvml, trainer.strategy.root_device)
        self._step, self._values, self._throttle = trainer.global_step, {}, 0
        self._active: set[str] = set()
        self._sampler = Sampler(self.seconds, folder, gpu)
        self._sampler.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        moved, self._step = step > self._step, step  # not after a dropped or undone step
        if not moved or step % trainer.log_every_n_steps:
            return
        if samples := self._sampler.drain():
            self._values, self._throttle = samples[-1], 0
            for sample in samples:
                self._throttle |= int(sample.get("gpu_throttle", 0))
            if "gpu_throttle" in self._values:
                self._values["gpu_throttle"] = float(self._throttle)
        pl_module.log_dict({f"hardware/{name}": value for name, value in self._values.items()})
        self._check_throttle(trainer)
        self._check_disk(trainer)
        self._check_throughput(trainer, batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._sampler is not None:
            self._sampler.stop()
            self._sampler = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.on_train_end(trainer, pl_module)

    def _check_throttle(self, trainer: Trainer) -> None:
        bits = torch.zeros(trainer.world_size, dtype=torch.int64)
        bits[trainer.global_rank] = self._throttle
        bits = reduce_processes(trainer, bits.to(trainer.strategy.root_device), "sum")
        for rank, value in enumerate(bits.tolist()):
            reasons = [reason for bit, reason in THROTTLED.items() if value & bit]
            message = f"GPU of process {rank}: {', '.join(reasons) or 'at its clocks again'}"
            self._tell(trainer, "throttled", bool(reasons), message, rank=rank, reasons=reasons)

    def _check_disk(self, trainer: Trainer) -> None:
        if "disk_free_gigabytes" not in self._values:
            return
        free = self._values["disk_free_gigabytes"]
        message = f"{free:.2f} GB free, expected at least {self.disk_gigabytes:g}"
        full = free < self.disk_gigabytes
        self._tell(trainer, "disk_nearly_full", full, message, free_gigabytes=free)

    def _check_throughput(self, trainer: Trainer, batch: Any) -> None:
        metrics = trainer.callback_metrics
        names = ("throughput/tokens_per_second", "throughput/steps_per_second")
        rates = [float(metrics[name]) for name in names if name in metrics]
        if not rates:
            return
        shape = tuple(getattr(getattr(batch, "tokens", batch), "shape", ()))
        outside = self.band.update(rates[0], shape, time.monotonic())
        least, largest = self.band.limits
        message = f"{rates[0]:,.1f} per second, expected {least:,.1f} to {largest:,.1f}"
        self._tell(trainer, "throughput_out_of_band", outside, message, rate=rates[0])

    def _tell(self, trainer: Trainer, kind: str, active: bool, message: str, **fields: Any) -> None:
        """Record a fault when it begins and when it ends."""
        name = f"{kind} {fields.get('rank', '')}"
        if active != (name in self._active):
            self._active ^= {name}
            record(trainer, kind, message, active=active, **fields)


class ThroughputBand:
    """Says whether a rate has been outside its limits for some time.

    Args:
        limits: Least and largest; ``None``: half and twice the median of rates that were inside.
        patience: Seconds that it must be outside without a break.
    """

    LEAST, WINDOW = 10, 100  # rates that make a median, and that it is taken over

    def __init__(self, limits: tuple[float, float] | None, patience: float):
        self.given, self.patience = limits, patience
        self._inside: deque[float] = deque(maxlen=self.WINDOW)
        self._shape: Any = None
        self._since: float | None = None  # outside since then

    @property
    def limits(self) -> tuple[float, float]:
        if self.given is not None:
            return self.given
        if len(self._inside) < self.LEAST:
            return 0.0, float("inf")
        usual = median(self._inside)
        return usual / 2, usual * 2

    def update(self, rate: float, shape: Any, now: float) -> bool:
        """Take in a rate, measured on batches of a shape; ``now`` in seconds."""
        if shape != self._shape:
            self._shape, self._since = shape, None
            self._inside.clear()
        least, largest = self.limits
        if least <= rate <= largest:
            self._inside.append(rate)
            self._since = None
            return False
        self._since = now if self._since is None else self._since
        return now - self._since >= self.patience
