"""Saves the run at regular steps and at its end."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.events import record
from smol.checkpoints.format import write_checkpoint
from smol.checkpoints.io import HYPER_PARAMETERS, MANIFEST_KEY
from smol.checkpoints.store import CheckpointInfo, FsspecStore, NonFiniteError
from smol.errors import UserError


class Checkpoint(Callback):
    """Saves a checkpoint every so many optimiser steps and at the end, and keeps the newest.

    A checkpoint is taken between two steps, when everything about the step before, its log rows and
    its validation included, is done. A checkpoint that was resumed from is never deleted. One with
    values that are not finite is not written, and an event; a second one ends the run.

    .. code-block:: yaml

        callbacks:
          checkpoint:
            class_path: callbacks.Checkpoint
            init_args: {every: 500, keep: 2}

    Args:
        every: Optimiser steps between checkpoints; 0 saves only at the end.
        keep: How many verified ones of this run to keep, at least 2.
        folder: Where they go, relative to the run folder.
    """

    order = 400

    def __init__(self, every: int = 500, keep: int = 2, folder: str = "checkpoints"):
        if keep < 2:
            raise UserError(f"keep is {keep}; at least 2, so that a damaged one can be replaced")
        self.every, self.keep, self.folder = every, keep, folder
        self._saved: tuple[int, int] | None = None  # lineage and step
        self._refused: int | None = None  # step of a checkpoint that was not finite
        self._sound: set[str] = set()  # keys written or verified by this process

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = _place(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        place = _place(trainer)
        due = self.every and trainer.global_step % self.every == 0
        # After a rollback at once, or a restart would take the way that was left.
        if place != self._saved and (due or place[0] != self._saved[0]):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _place(trainer) != self._saved:
            self._save(trainer, last=True)

    def _save(self, trainer: Trainer, last: bool = False) -> None:
        with trainer.profiler.profile("save_checkpoint"):
            self._gather_and_write(trainer, last)

    def _gather_and_write(self, trainer: Trainer, last: bool) -> None:
        # All ranks take part in gathering the state; the first one writes it.
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        failure = None
        if trainer.is_global_zero:
            try:
                self._write(trainer, checkpoint)
            except Exception as error:
                failure = error
        refused = trainer.strategy.broadcast(isinstance(failure, NonFiniteError))
        step = trainer.global_step
        if refused and not last and step <= (self._refused or step):
            # A guard may see the same and go back; if none does, the next one ends the run.
            self._refused = step
            record(trainer, "checkpoint_refused", str(failure))
            return
        if trainer.strategy.broadcast(failure is not None):
            raise failure or RuntimeError("the first rank could not save a checkpoint")
        self._saved, self._refused = _place(trainer), None

    def _write(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        store = FsspecStore(Path(trainer.default_root_dir, self.folder))
        metadata = {"world_size": trainer.world_size} | checkpoint.get(MANIFEST_KEY, {})
        content = {key: v for key, v in checkpoint.items() if key not in HYPER_PARAMETERS}
        step = trainer.global_step
        info = store.save(step, lambda folder: write_checkpoint(folder, content), metadata)
        self._sound.add(info.key)
        protected = {info.key, Path(trainer.ckpt_path).name if trainer.ckpt_path else None}
        sound = 0
        for older in reversed(store.list()):
            if sound < self.keep:
                sound += self._is_sound(store, older)
            elif older.key not in protected:
                store.delete(older)

    def _is_sound(self, store: FsspecStore, info: CheckpointInfo) -> bool:
        """Whether it passes verification; one that does not is no reason to delete another."""
        if info.key not in self._sound:
            try:
                store.verify(info)
            except UserError:
                return False
            self._sound.add(info.key)
        return True


def _place(trainer: Trainer) -> tuple[int, int]:
    """Where a run is: a rollback comes to the same step again, on another lineage."""
    return getattr(trainer.lightning_module, "lineage", None) or 0, trainer.global_step
