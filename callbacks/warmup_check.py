"""Tries a run out before it begins in earnest."""

import json
from dataclasses import asdict
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.events import record
from callbacks.parts.collectives import gather, try_all_reduce
from callbacks.parts.trial_data import open_trial_data, vocab_size_of
from callbacks.parts.trial_run import run_trial
from callbacks.parts.trial_steps import trial_steps
from callbacks.parts.trial_verdicts import (
    Verdict,
    judge_collectives,
    judge_data,
    judge_loss,
    judge_memory,
    judge_throughput,
    unusual,
)
from smol.errors import UserError


class WarmupCheck(Callback):
    """Trains the first steps on a little of the data, looks, goes back to step 0 and begins.

    Only a run that is at step 0 is checked: one that was killed in its check is checked again, one
    that was resumed, or continues another, is not, nor is a ``fast_dev_run``. The steps are taken
    with the strategy, precision, accumulation, clipping and learning rates of the run, and with
    none of its callbacks and loggers. They leave nothing behind: with and without them every later
    loss, weight, log row and checkpoint is bit-identical. Looked at is:

    - ``collectives``: the sum of a known buffer over all processes, and its bus bandwidth as
      nccl-tests define it; if it is wrong, nothing else is.
    - ``data``: tokens are in the vocabulary, targets the tokens that follow, positions count from
      the beginning of each document, processes have different rows, and what is read again is the
      same. A batch that fails is not trained on. Of other batches than ``smol.data.batch``'s only
      whether numbers are finite, and differ between processes.
    - ``loss``: it is finite and falls; one of weights that were trained before need not fall.
    - ``throughput``: tokens per second (steps where there are no tokens), the first tenth left out.
      Each trial step waits for the device, as the steps of a run do not.
    - ``memory``: the least share that was free, on the device if that is CUDA, else on the host.

    What was found is written to a file in the run folder, an event ``warmup_check``, and a table.
    If anything fails, all processes stop with one line that says what. Events only are a step that
    took three times the median (``slow_step``), a process that takes 1.5 times the median for a
    product of matrices of its own (``slow_process``), and a first loss that is a nat from a uniform
    guess's (``first_loss``).

    The data must be ``smol.data.Pretraining`` or a DataLoader over a dataset with a length, whose
    items do not depend on how often they were read; of the latter the first samples are used, in
    their order. It works in one process, under DDP and FSDP2, with automatic optimisation; the
    module's own ``on_train_start`` comes after it. In a list of callbacks of one's own, put it
    first.

    .. code-block:: yaml

        callbacks:
          warmup_check:
            class_path: callbacks.WarmupCheck
            init_args: {steps: 100, data_share: 0.01, band: [50000, 500000]}

    Args:
        steps: Optimiser steps of the check, at least 2.
        data_share: Share of the run's data that they are taken on, again and again; at least one
            step's.
        fall: Nats by which the mean loss of the last tenth of steps must be below that of the first
            tenth; ``null`` checks only that it is finite.
        band: Least and largest tokens (or steps) per second.
        memory_headroom: Least share of the memory that must stay free.
        allreduce_megabytes: Size of the buffer that is summed.
        least_gigabytes_per_second: Least bus bandwidth, of 10^9 bytes.
        filename: Name of the report in the run folder.
    """

    order = 90  # before others begin to measure, or to wrap something

    def __init__(
        self,
        steps: int = 100,
        data_share: float = 0.01,
        fall: float | None = 0.02,
        band: tuple[float, float] | None = None,
        memory_headroom: float = 0.05,
        allreduce_megabytes: float = 16.0,
        least_gigabytes_per_second: float | None = None,
        filename: str = "warmup_check.json",
    ):
        if steps < 2 or not 0 < data_share <= 1:
            raise UserError(
                f"WarmupCheck steps is {steps}, data_share {data_share:g}; expected at least 2 "
                "steps, on a share above 0 and up to 1"
            )
        if band is not None and not 0 <= band[0] < band[1]:
            raise UserError(f"WarmupCheck band is {list(band)}, expected [least, largest]")
        self.steps, self.data_share, self.fall, self.band = steps, data_share, fall, band
        self.memory_headroom, self.allreduce_megabytes = memory_headroom, allreduce_megabytes
        self.least_gigabytes_per_second = least_gigabytes_per_second
        self.filename = filename

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step or trainer.fast_dev_run:
            return
        if not pl_module.automatic_optimization:
            raise UserError(
                "WarmupCheck takes its steps by automatic optimisation, which this module does not "
                "use; go without it with --callbacks.warmup_check null"
            )
        path = Path(trainer.default_root_dir, self.filename)
        if trainer.is_global_zero:
            path.unlink(missing_ok=True)  # of an earlier attempt
        verdicts, notes = self._check(trainer, pl_module)
        self._report(trainer, path, verdicts, notes)

    def _check(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> tuple[list[Verdict], dict[str, str]]:
        """What all processes found, and what is unusual; every process returns the same."""
        device = trainer.strategy.root_device
        sums = gather(try_all_reduce(device, self.allreduce_megabytes))
        verdicts = [judge_collectives(sums, self.least_gigabytes_per_second)]
        if any(seen is not None and seen.wrong for seen in sums):
            return verdicts, {}
        with trial_steps(trainer, pl_module) as trial:
            data = open_trial_data(trainer, self.steps, self.data_share)
            ranks = gather(run_trial(trial, data, vocab_size_of(trainer, pl_module)))
        verdicts.append(judge_data(ranks, data.different))
        losses = ranks[0].losses  # of all processes
        if not losses:
            return verdicts, {}
        begins_anew = getattr(pl_module, "initial_weights", None) is None
        verdicts.append(judge_loss(losses, self.fall, begins_anew))
        verdicts.append(throughput := judge_throughput(ranks, self.band))
        verdicts.append(judge_memory(ranks, self.memory_headroom))
        decoder = getattr(pl_module, "decoder_config", None)
        guesses = decoder.vocab_size if begins_anew and decoder is not None else None
        return verdicts, unusual(throughput, losses[0], guesses)

    def _report(
        self, trainer: Trainer, path: Path, verdicts: list[Verdict], notes: dict[str, str]
    ) -> None:
        failed = [verdict for verdict in verdicts if not verdict.passed]
        outcome = f"failed: {', '.join(v.name for v in failed)}" if failed else "passed"
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            checks = [asdict(verdict) for verdict in verdicts]
            report = {"passed": not failed, "checks": checks, "unusual": notes}
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(f"warm-up check {outcome}")
            for verdict in verdicts:
                print(f"  {verdict.name:<12} {verdict.seen}")
        record(trainer, "warmup_check", outcome, **{v.name: v.seen for v in verdicts})
        for kind, message in notes.items():
            record(trainer, kind, message)
        if failed:
            raise UserError(
                f"the warm-up check failed: {'; '.join(map(str, failed))}; all that was measured "
                f"is in {path}; go without it with --callbacks.warmup_check null"
            )
