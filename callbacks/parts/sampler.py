"""Reads the state of the machine in a thread of its own."""

import threading
from collections import deque
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch.utilities import rank_zero_info

# Bits of nvmlDeviceGetCurrentClocksThrottleReasons in nvml.h that tell of a fault. Idle clocks (1)
# and the power cap (4), at which a busy card spends its life, do not.
UNREADABLE = 1 << 30  # ours
THROTTLED = {
    8: "hardware slowdown",
    32: "hot (software slows it down)",
    64: "hot (hardware slows it down)",
    128: "power brake",
    UNREADABLE: "the driver does not answer",
}


class Sampler(threading.Thread):
    """Samples the machine until it is stopped; ``gpu`` is a callable that reads one, or None."""

    def __init__(self, seconds: float, folder: Path, gpu: Any):
        super().__init__(name="hardware sampler", daemon=True)
        self.seconds, self.folder, self.gpu = seconds, folder, gpu
        self._samples: deque[dict[str, float]] = deque(maxlen=10_000)
        self._end = threading.Event()

    def run(self) -> None:
        psutil.cpu_percent()  # the next call tells the time since this one
        while not self._end.wait(self.seconds):
            self._samples.append(self._sample())

    def _sample(self) -> dict[str, float]:
        sample = {
            "cpu_percent": psutil.cpu_percent(),
            "ram_percent": psutil.virtual_memory().percent,
            "disk_free_gigabytes": psutil.disk_usage(str(self.folder)).free / 1e9,
        }
        if self.gpu is not None:
            try:
                sample |= self.gpu()
            except Exception:  # whatever the driver raises for a card that fell off the bus
                sample["gpu_throttle"] = float(UNREADABLE)
        return sample

    def drain(self) -> list[dict[str, float]]:
        """The samples since the last call."""
        return [self._samples.popleft() for _ in range(len(self._samples))]

    def stop(self) -> None:
        """End the thread; one that waits for a driver that does not answer is left behind."""
        self._end.set()
        self.join(timeout=10)


def open_gpu(nvml: Any, device: torch.device) -> Any:
    """Find the GPU of this process.

    Args:
        nvml: The module ``pynvml`` or one like it; None imports it where the device is CUDA.
        device: The one that trains.

    Returns:
        A callable that reads it, or None if there is none to read. ``gpu_throttle`` holds the bits
        of ``nvmlDeviceGetCurrentClocksThrottleReasons``.
    """
    if nvml is None:
        if device.type != "cuda":
            return None
        try:
            import pynvml as nvml
        except ImportError:
            rank_zero_info('no GPU figures without nvidia-ml-py: pip install -e ".[gpu]"')
            return None

    def read() -> dict[str, float]:
        return {
            "gpu_percent": float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            "gpu_memory_gigabytes": nvml.nvmlDeviceGetMemoryInfo(handle).used / 1e9,
            "gpu_celsius": float(nvml.nvmlDeviceGetTemperature(handle, 0)),
            "gpu_watts": nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "gpu_throttle": float(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        }

    try:
        nvml.nvmlInit()
        if device.type == "cuda":  # its index is another where CUDA_VISIBLE_DEVICES hides some
            uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        else:
            handle = nvml.nvmlDeviceGetHandleByIndex(0)
        read()  # a slice of a card (MIG) does not answer all of it
    except nvml.NVMLError as error:
        rank_zero_info(f"no GPU figures: {error}")
        return None
    return read
