"""What the processes of a run tell each other, whether it arrives, and how fast they are."""

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from callbacks.parts.loop_timer import synchronize

PERIOD = 8  # small whole numbers, so that sums over 2,000 processes are exact in float32


@dataclass(frozen=True)
class AllReduce:
    """An all-reduce as one process saw it.

    Attributes:
        processes: How many took part.
        elements: How many were summed.
        wrong: How many of the sums are not what they should be.
        seconds: Mean time of the ones that followed.
    """

    processes: int
    elements: int
    wrong: int
    seconds: float

    @property
    def bus_bandwidth(self) -> float:
        """Bytes per second over the slowest link, ``2 (n - 1) / n`` of the buffer each time.

        That is nccl-tests' measure, the same for any number of processes n:
        https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
        """
        crossings = 2 * (self.processes - 1) / self.processes
        return crossings * 4 * self.elements / self.seconds


def try_all_reduce(device: torch.device, megabytes: float, repeats: int = 5) -> AllReduce | None:
    """Sum a float32 buffer whose sum is known over all processes, then time the same again.

    Args:
        device: Where the run's gradients are.
        megabytes: Size of the buffer, of 2^20 bytes each.
        repeats: How often it is timed.

    Returns:
        What came of it on this process; ``None`` where there is only one.
    """
    if not _is_distributed():
        return None
    rank, processes = dist.get_rank(), dist.get_world_size()
    elements = max(1, int(megabytes * 2**20) // 4)
    pattern = torch.arange(elements, device=device).remainder(PERIOD).float() + 1
    buffer = pattern * (rank + 1)
    dist.all_reduce(buffer)
    wrong = int((buffer != pattern * (processes * (processes + 1) / 2)).sum())
    buffer.zero_()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(buffer)
    synchronize(device)
    return AllReduce(processes, elements, wrong, (time.perf_counter() - began) / repeats)


def reduce_processes(trainer: Any, tensor: Tensor, reduce_op: str) -> Tensor:
    """Reduce what differs between any two processes; all have to ask.

    ``trainer.strategy.reduce`` may leave out those that have the same data as others, so that sums
    count each datum once.
    """
    return trainer.strategy.reduce(tensor, group=dist.group.WORLD, reduce_op=reduce_op)


def reads_first(trainer: Any) -> bool:
    """Whether no process before this one has the same data."""
    return getattr(trainer.strategy, "reads_first", True)


def gather(value: Any) -> list[Any]:
    """The values of all processes by rank, on all of them; they travel as pickles."""
    if not _is_distributed():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def time_product(device: torch.device, repeats: int = 5) -> float:
    """Seconds of a product of two matrices on this process alone, the shortest of some times."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        began = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])  # the first one sets up


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
