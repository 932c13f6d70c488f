"""Saves the run, brings its checkpoints to safety, and keeps the newest."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.events import record
from callbacks.parts.collectives import gather
from callbacks.parts.save_requests import SaveRequests
from smol.checkpoints.io import HYPER_PARAMETERS, MANIFEST_KEY
from smol.checkpoints.mirror import News
from smol.checkpoints.replicas import RemoteRuns
from smol.checkpoints.retention import Retention
from smol.checkpoints.rotation import Rotation
from smol.checkpoints.store import FsspecStore, NonFiniteError
from smol.checkpoints.together import save_together
from smol.errors import UserError
from smol.modules.steps import place_of
from smol.runs import CHECKPOINTS

TERMINATED = 143  # what a shell reports of a process that SIGTERM ended


class CheckpointRotation(Callback):
    """Saves checkpoints to the run folder and, in the background, to a store; keeps the newest.

    One is taken between two steps, when log rows and validation of the step before are done: every
    so many steps or minutes; when a stage ends (``batch.stage`` changes; it is pinned); on SIGUSR1;
    when a file ``save`` appears in the run folder; on SIGTERM, after which the run ends with exit
    status 143; and at the end of training, which waits for the upload. Steps do not wait for it.

    A save that fails, as on a full disk, is an event, and the run goes on, except at its end; it is
    tried again if it was asked for or ended a stage. One with values that are not finite is not
    kept; a second one ends the run, an unreachable store never. What is pinned, was resumed from or
    is on its way stays. Of two processes that write to a run the older one stops, with an event.

    Events: ``saved``, ``save_failed``, ``delete_failed``, ``uploaded``, ``upload_failed``,
    ``dropped``, ``fenced``, ``terminated``. With a store, ``checkpoint/seconds_stalled`` (by the
    last save) and ``checkpoint/age_of_durable_seconds`` are logged.

    .. code-block:: yaml

        callbacks:
          checkpoint:
            class_path: callbacks.CheckpointRotation
            init_args: {every: 500, keep: 2, store: "s3://bucket/runs"}

    Args:
        every: Optimiser steps between checkpoints; 0 for none by steps.
        minutes: Minutes between checkpoints; null for none by the clock.
        keep: How many verified ones of this run to keep, at least 2.
        keep_every: Those at multiples of so many steps stay for good.
        store: Path or fsspec URL of a folder for all runs; this one's are under its name in it.
        storage_options: Of the store's file system, such as endpoint and keys of an S3 server.
        spare: How many to keep in the run folder although they are in the store, at least 1.
        disk_gigabytes: What may wait in the run folder for an upload; then the oldest are given up.
        patience: Seconds that the end of training waits for the upload.
    """

    order = 400

    def __init__(
        self,
        every: int = 500,
        minutes: float | None = None,
        keep: int = 2,
        keep_every: int | None = None,
        store: str | None = None,
        storage_options: dict[str, Any] | None = None,
        spare: int = 1,
        disk_gigabytes: float | None = None,
        patience: float = 600.0,
    ):
        if minutes is not None and minutes <= 0:
            raise UserError(f"CheckpointRotation minutes is {minutes:g}, expected more than 0")
        self.every, self.minutes = every, minutes
        self.retention = Retention(keep, keep_every)
        self.remote = None if store is None else RemoteRuns(store, storage_options)
        self.spare, self.disk_gigabytes, self.patience = spare, disk_gigabytes, patience
        self._untold: list[News] = []
        self._refused: int | None = None  # step of a checkpoint that was not finite
        self._requests: SaveRequests | None = None
        self._rotation: Rotation | None = None  # of the first rank

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        mine = Path(trainer.ckpt_path).name if trainer.ckpt_path else "no checkpoint"
        if len(names := set(gather(mine))) > 1:
            raise UserError(f"processes start from different checkpoints: {', '.join(names)}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = Path(trainer.default_root_dir)
        self._saved, self._stage, self._ended, self._seconds = place_of(trainer), None, False, 0.0
        self._requests = SaveRequests(run, self.minutes)
        self._requests.listen()
        if trainer.is_global_zero:
            self._rotation = Rotation(
                FsspecStore(run / CHECKPOINTS),
                None if self.remote is None else self.remote.of(run.absolute().name),
                self.retention,
                self.spare,
                None if self.disk_gigabytes is None else int(self.disk_gigabytes * 1e9),
                trainer.ckpt_path,
            )
            self._rotation.begin()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if getattr(batch, "micro", batch_idx % trainer.accumulate_grad_batches):
            return
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self._tell(trainer)
        stage = getattr(batch, "stage", None)
        ended, self._stage = self._stage not in (None, stage), stage
        self._ended |= ended  # until it is saved
        wanted, terminated = self._requests.take(trainer)
        place = place_of(trainer)
        due = self.every and trainer.global_step % self.every == 0
        # After a rollback at once: a restart would take the way that was left.
        if due or wanted or ended or place[0] != self._saved[0]:
            if place != self._saved:
                self._save(trainer, pinned=self._ended)
            self._ended &= place != self._saved
            self._requests.answer(place == self._saved, again=wanted or ended)
        if terminated:
            self._finish(trainer)
            record(trainer, "terminated", f"SIGTERM: the run ends with status {TERMINATED}")
            raise SystemExit(TERMINATED)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        mirror = self._rotation.mirror if self._rotation is not None else None
        if mirror is not None and trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log("checkpoint/seconds_stalled", self._seconds, rank_zero_only=True)
            if (age := mirror.age_of_durable) is not None:
                pl_module.log("checkpoint/age_of_durable_seconds", age, rank_zero_only=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if place_of(trainer) != self._saved:
            self._save(trainer, last=True)
        self._finish(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self._requests is not None:
            self._requests.close()
        if self._rotation is not None:
            self._rotation.stop()
        self._tell(trainer)

    def _finish(self, trainer: Trainer) -> None:
        self._requests.close()
        if self._rotation is not None:
            self._rotation.finish(self.patience)
        self._tell(trainer)

    def _save(self, trainer: Trainer, pinned: bool = False, last: bool = False) -> None:
        began = time.monotonic()
        with trainer.profiler.profile("save_checkpoint"):
            # The first rank writes, or all of them, if the state is sharded.
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            failure = None
            try:
                self._write(trainer, checkpoint, pinned)
            except Exception as error:
                failure = error
        self._seconds = time.monotonic() - began
        if failure is not None:
            self._untold.append(News("save_failed", f"{type(failure).__name__}: {failure}", {}))
        self._tell(trainer)
        # A guard may see what is not finite, and go back; if none does, it happens again.
        refused = trainer.global_step if isinstance(failure, NonFiniteError) else None
        once = refused is not None and refused <= (self._refused or refused)
        self._refused = refused
        if not trainer.strategy.broadcast(failure is not None):
            self._saved = place_of(trainer)
        elif trainer.strategy.broadcast(last or (isinstance(failure, UserError) and not once)):
            raise failure or RuntimeError("the first rank could not save a checkpoint")

    def _write(self, trainer: Trainer, checkpoint: dict[str, Any], pinned: bool) -> None:
        metadata = {"world_size": trainer.world_size} | checkpoint.get(MANIFEST_KEY, {})
        content = {key: v for key, v in checkpoint.items() if key not in HYPER_PARAMETERS}
        step = trainer.global_step
        save_together(content, lambda write: self._rotation.save(step, write, metadata, pinned))

    def _tell(self, trainer: Trainer) -> None:
        if self._rotation is not None:
            self._untold += self._rotation.news()
        while self._untold:
            news = self._untold[0]
            try:
                record(trainer, news.kind, news.message, **news.fields)
            except OSError:  # the disk is full; later
                return
            self._untold.pop(0)
