"""Things that go wrong, at a step of one's choice."""

import json
import os
from collections import Counter
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.events import record
from callbacks.parts.fault_hooks import largest_file
from callbacks.parts.faults import Fault
from smol.errors import UserError

__all__ = ["Fault", "FaultInjection"]


class FaultInjection(Callback):
    """Makes things go wrong at chosen steps, for tests and drills.

    It works with any module that has automatic optimisation, in one process, under DDP and FSDP2.
    From its ``step`` on, a fault strikes in each optimiser step until it has struck ``times`` (1)
    times in the life of the run, also if that is restarted or taken back to an earlier step: each
    strike is written to a file in the run folder before it happens. Delete that file to drill
    again. A strike is also an event ``fault``.

    *In one micro-batch*, the last of the step if ``micro`` does not say which:

    - ``nan_loss``, ``inf_loss``: the loss that ``training_step`` returns, and so all gradients.
    - ``loss_spike``: the output of a module is multiplied by ``value`` (100); the loss is finite.
    - ``nan_activation``: one element of the output of a module.
    - ``corrupt_batch``: token ids and targets are random; in other batches integers are, and floats
      are noise of ``value`` (10) times their deviation.
    - ``gradient_explosion``: gradients are multiplied by ``value`` (1e6), the loss is as it was.
    - ``nan_gradient_before_reduce``: one element of a parameter's gradient in one process, before
      the processes reduce it.

    *When the gradients of the step are complete*:

    - ``nan_gradient``, ``inf_gradient``: one element in one process, after it was reduced.

    *Before a micro-batch*, the first of the step if ``micro`` does not say which:

    - ``nan_weight``, ``nan_moment``: one element of a parameter, of what the optimiser keeps of it.
    - ``scaled_weight``: a parameter is multiplied by ``value`` (1.5).
    - ``slow_step``: it takes ``seconds`` (1) longer; a process hangs with very many.
    - ``kill``: the process kills itself with SIGKILL; nothing is closed or flushed.
    - ``full_disk``: until the next optimiser step begins no file that this process writes can grow,
      wherever it is and whoever writes (a limit of the system's, ``RLIMIT_FSIZE``, of 0 bytes).
      Writes fail with ``OSError`` 27, ``EFBIG``, where a full disk says 28, ``ENOSPC``.
    - ``lost_device``: on CUDA an assertion fails on the device, which no later call of this process
      survives; elsewhere an error of the same type is raised, and only that.

    Faults in tensors strike the first element of what the process has of them. Under DDP a weight,
    moment or reduced gradient is struck in the replica of one process only, unless ``rank`` is
    null; under FSDP2 in its shard.

    .. code-block:: yaml

        callbacks:
          faults:
            class_path: callbacks.FaultInjection
            init_args:
              faults:
                - {kind: nan_gradient, step: 120}
                - {kind: nan_activation, step: 200, rank: 1, micro: 2, target: model.layers.3}
                - {kind: kill, step: 300}

    Args:
        faults: What goes wrong, and when.
        filename: Name of the file of strikes in the run folder.
    """

    order = 50

    def __init__(self, faults: list[Fault], filename: str = "faults.jsonl"):
        for name, number in Counter(map(str, faults)).items():
            if number > 1:
                raise UserError(f"fault '{name}' is there {number} times; have one, with times")
        self.faults, self.filename = faults, filename
        self._waiting: list[Fault] = []
        self._open = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Here, because no process strikes before all have left this hook.
        self._path = Path(trainer.default_root_dir, self.filename)
        self._strikes = _count_strikes(self._path)
        self._waiting = [f for f in self.faults if self._strikes[str(f)] < f.times]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for fault in self.faults:
            fault.check_target(pl_module)
            if fault.rank is not None and fault.rank >= trainer.world_size:
                number = trainer.world_size
                raise UserError(f"fault {fault.kind}: rank is {fault.rank}, of {number} processes")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._micro = batch_idx % trainer.accumulate_grad_batches
        if self._micro == 0:
            self._open.close()
        self._strike_due(trainer, pl_module, reduced=False)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._strike_due(trainer, pl_module, reduced=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._open.__exit__(type(exception), exception, exception.__traceback__)

    def _strike_due(self, trainer: Trainer, module: LightningModule, reduced: bool) -> None:
        step, accumulation = trainer.global_step, trainer.accumulate_grad_batches
        for fault in self._waiting.copy():
            if step < fault.step or reduced != (fault.about.when == "reduced"):
                continue
            if fault.micro is not None and fault.micro >= accumulation:
                raise UserError(
                    f"fault {fault.kind}: micro is {fault.micro}, of {accumulation} micro-batches"
                )
            if fault.is_at(self._micro, last=not trainer.fit_loop._should_accumulate()):
                self._strike(fault, trainer, module)

    def _strike(self, fault: Fault, trainer: Trainer, module: LightningModule) -> None:
        """Every process counts, those that are struck write, and the first one tells."""
        self._strikes[str(fault)] += 1
        number = self._strikes[str(fault)]
        if number == fault.times:
            self._waiting.remove(fault)
        is_here = fault.rank in (None, trainer.global_rank)
        fields = {"fault": fault.kind, "rank": fault.rank, "micro": self._micro, "strike": number}
        with largest_file(None):  # an earlier fault may have filled the disk
            if is_here:
                _append(self._path, str(fault), trainer)
            record(trainer, "fault", f"{fault} (strike {number} of {fault.times})", **fields)
        if is_here:
            with torch.no_grad():
                context = fault.about.strike(fault, module)
            if context is not None:
                self._open.enter_context(context)


def _append(path: Path, fault: str, trainer: Trainer) -> None:
    """Add a line that will be there even if this process ends now."""
    row = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "step": trainer.global_step,
        "rank": trainer.global_rank,
        "fault": fault,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _count_strikes(path: Path) -> Counter[str]:
    """How often each fault has struck: one in several processes as often as it did in any."""
    rows = (
        [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    )
    strikes: Counter[str] = Counter()
    for (fault, _), number in Counter((row["fault"], row["rank"]) for row in rows).items():
        strikes[fault] = max(strikes[fault], number)
    return strikes
