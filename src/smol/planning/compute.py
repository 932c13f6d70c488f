"""Time, money, checkpoints and data of a run, by formula."""

from dataclasses import dataclass

from smol.model.config import DecoderConfig
from smol.model.flops import flops_per_token, num_parameters

CHECKPOINT_BYTES = 12  # of a parameter: the float32 weight and AdamW's two moments
MOST_EPOCHS = 4.0
"""Repetitions up to which more of the same is nearly as good as new data (Muennighoff et al. 2023,
https://arxiv.org/abs/2305.16264)."""
TOKENS_PER_PARAMETER = 20.0
"""About what makes the best loss of a given compute (Hoffmann et al. 2022,
https://arxiv.org/abs/2203.15556)."""
TRIALS_SHARE = 161_280 / 276_480
"""GPU-hours of SmolLM3's ablations and debugging, as a share of those of its main run."""


@dataclass(frozen=True)
class Compute:
    """What a training run computes, and how long that takes.

    Attributes:
        flops_per_token: Training operations, by PaLM's convention.
        flops: Of the whole run.
        tokens_per_second: Of each device.
        device_hours: Of all devices together.
        days: On the clock, without interruptions.
    """

    flops_per_token: float
    flops: float
    tokens_per_second: float
    device_hours: float
    days: float


def training_compute(
    config: DecoderConfig, tokens: float, context: int, devices: int, speed: float
) -> Compute:
    """Plan the time of a run.

    Args:
        config: Shape of the decoder.
        tokens: To train on.
        context: Tokens per sequence.
        devices: That share the work.
        speed: Operations per second that one device reaches: its peak times the model-FLOPs
            utilisation, which is PaLM's too (attention over the whole context).

    Returns:
        Operations and time.
    """
    per_token = flops_per_token(config, context)
    hours = tokens * per_token / speed / 3600
    return Compute(per_token, tokens * per_token, speed / per_token, hours, hours / devices / 24)


@dataclass(frozen=True)
class Checkpoints:
    """What saving costs.

    Attributes:
        bytes: Of one checkpoint.
        count: Of the whole run.
        upload_seconds: Until one is in the store.
        bandwidth_share: Of the interval that uploading takes; beyond 1 the store falls behind.
        stall_share: Of the run's time that it waits for local copies.
    """

    bytes: float
    count: int
    upload_seconds: float
    bandwidth_share: float
    stall_share: float


def checkpoint_traffic(
    config: DecoderConfig,
    days: float,
    interval_hours: float,
    store_bandwidth: float,
    disk_bandwidth: float,
    writers: int,
) -> Checkpoints:
    """Plan the traffic of checkpoints. Training waits for the local copy only, not for the store.

    Args:
        config: Shape of the decoder.
        days: Length of the run.
        interval_hours: Between two checkpoints.
        store_bandwidth: Bytes per second to the store, of all machines together.
        disk_bandwidth: Bytes per second that one process writes locally.
        writers: Processes that write a part each: those that share a copy of the parameters.

    Returns:
        Sizes and times.
    """
    size = CHECKPOINT_BYTES * num_parameters(config)
    upload, interval = size / store_bandwidth, interval_hours * 3600
    stall = size / writers / disk_bandwidth
    count = max(int(days * 24 / interval_hours), 1)
    return Checkpoints(size, count, upload, upload / interval, stall / (interval + stall))
