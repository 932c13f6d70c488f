"""Says which data a run is reading, so that a death without a last word has a place."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from smol.restarts import HEARTBEAT, SUPERVISED, TERMINATED, launcher


def is_launched() -> bool:
    """Whether something starts this command again when it dies."""
    return SUPERVISED in os.environ or launcher() is not None


class Heartbeat(Callback):
    """Writes the data of each optimiser step into the run folder before the step is taken.

    ``heartbeat.json`` has ``time``, ``step`` (completed optimiser steps), ``position`` (tokens read
    before), ``stage``, ``context``, ``global_batch`` and ``sources`` (weight by name). The first
    process writes; nothing is flushed to the disk, because a process that dies loses nothing that
    it wrote. Data without a curriculum has no heartbeat. Of a run that ended as SIGTERM asks it to,
    there is ``terminated`` instead.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.file = None
        loader = getattr(trainer.datamodule, "loader", None)
        if trainer.is_global_zero and hasattr(loader, "curriculum"):
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.file = open(folder / HEARTBEAT, "wb", buffering=0)  # noqa: SIM115

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.file is None or getattr(batch, "micro", 0):
            return
        loader = trainer.datamodule.loader
        segment = loader.curriculum.segment(loader.position)
        beat = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": trainer.global_step,
            "position": loader.position,
            "stage": segment.stage,
            "context": segment.context,
            "global_batch": segment.global_batch,
            "sources": segment.weights,
        }
        line = json.dumps(beat).encode()
        os.pwrite(self.file.fileno(), line, 0)
        os.ftruncate(self.file.fileno(), len(line))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        terminated = isinstance(exception, SIGTERMException)
        terminated |= getattr(exception, "code", None) == TERMINATED
        if trainer.is_global_zero and terminated:
            path = Path(trainer.default_root_dir, HEARTBEAT)
            path.write_text(json.dumps({"terminated": True}), encoding="utf-8")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if getattr(self, "file", None) is not None:
            self.file.close()
            self.file = None
