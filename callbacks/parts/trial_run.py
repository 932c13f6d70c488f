"""Takes trial steps, and notes what this process sees of them."""

import math
import time
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import psutil
import torch

from callbacks.parts.collectives import reads_first, time_product
from callbacks.parts.trial_data import TrialData, count_tokens, find_fault, fingerprints
from callbacks.parts.trial_steps import TrialSteps

_NO_ROWS = np.empty(0, dtype=np.uint64)


@dataclass
class Measured:
    """What one process saw; lists are by optimiser step.

    Attributes:
        faults: What is wrong with the data.
        rows: Fingerprints of the rows of tokens, those that a process before this one has left out.
        tokens: Tokens of these rows, or 0.
        losses: Of all processes; none of a step that was dropped.
        seconds: Of the whole step.
        data_seconds: Those of them spent waiting for data.
        memory_left: Least share of the memory that was free, 0 to 1.
        product_seconds: Of a product of matrices on this process alone.
    """

    faults: list[str] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    data_seconds: list[float] = field(default_factory=list)
    memory_left: float = 1.0
    product_seconds: float = 0.0


def run_trial(trial: TrialSteps, data: TrialData, vocab_size: int | None) -> Measured:
    """Take all steps, or those until something is wrong in any process.

    Args:
        trial: Takes them.
        data: What on.
        vocab_size: How many tokens there are, if that is known.
    """
    device = trial.device
    seen = Measured(product_seconds=time_product(device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with closing(iter(data)) as steps:
        for step in range(len(data)):
            began = time.perf_counter()
            micro_batches = next(steps)
            waited = time.perf_counter() - began
            own = micro_batches if reads_first(trial.trainer) else []
            seen.rows.append(np.concatenate([_NO_ROWS, *map(fingerprints, own)]))
            faults = (find_fault(batch, vocab_size) for batch in micro_batches)
            seen.faults += [f"{fault} (step {step})" for fault in faults if fault]
            if data.differs(step, micro_batches):
                seen.faults.append(f"read twice, a batch was not the same (step {step})")
            if trial.any_process(bool(seen.faults)):
                break
            loss, seconds = trial.take(micro_batches)
            seen.losses += [] if loss is None else [loss]
            seen.seconds.append(waited + seconds)
            seen.data_seconds.append(waited)
            seen.tokens.append(sum(map(count_tokens, own)))
            seen.memory_left = min(seen.memory_left, _memory_left(device))
            if loss is not None and not math.isfinite(loss):
                break
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # of the run itself from now on
    return seen


def _memory_left(device: torch.device) -> float:
    """The share of the memory that is free, 0 to 1; on CUDA it was so at the fullest moment."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        peak = torch.cuda.max_memory_reserved(device) - torch.cuda.memory_reserved(device)
        return (free - peak) / total
    memory = psutil.virtual_memory()
    return memory.available / memory.total
