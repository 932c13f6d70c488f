"""Saves the run at regular steps and at its end."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from smol.checkpoints.store import FsspecStore, new_key


class Checkpoint(Callback):
    """Saves a checkpoint every so many optimiser steps and at the end, and keeps the newest.

    A checkpoint is taken between two steps, when everything about the step before, its log rows and
    its validation included, is done. A checkpoint that was resumed from is never deleted.

    .. code-block:: yaml

        callbacks:
          checkpoint:
            class_path: callbacks.Checkpoint
            init_args: {every: 500, keep: 2}

    Args:
        every: Optimiser steps between checkpoints; 0 saves only at the end.
        keep: How many of this run to keep, at least 2: the newest one may be the damaged one.
        folder: Where they go, relative to the run folder.
    """

    order = 400

    def __init__(self, every: int = 500, keep: int = 2, folder: str = "checkpoints"):
        if keep < 2:
            raise ValueError(f"keep is {keep}; at least 2, so that a damaged one can be replaced")
        self.every, self.keep, self.folder = every, keep, folder
        self._saved_step: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.every and step % self.every == 0 and step != self._saved_step:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._saved_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        root = Path(trainer.default_root_dir, self.folder)
        root.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(root / new_key(trainer.global_step), weights_only=False)
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            self._rotate(FsspecStore(root), trainer.ckpt_path)

    def _rotate(self, store: FsspecStore, resumed_from: Any) -> None:
        for info in store.list()[: -self.keep]:
            if resumed_from is None or Path(resumed_from).name != info.key:
                store.delete(info)
