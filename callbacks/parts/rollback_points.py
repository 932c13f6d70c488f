"""The states that a run can return to: snapshots in memory, then its checkpoints."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from callbacks.events import record
from callbacks.parts.collectives import reduce_processes
from callbacks.parts.spike_detector import SpikeDetector
from smol.checkpoints.manifest import Manifest
from smol.checkpoints.replicas import RemoteRuns
from smol.errors import UserError
from smol.modules.snapshot import Snapshot
from smol.modules.steps import move_step_count
from smol.runs import replicas

log = logging.getLogger(__name__)


@dataclass
class _Point:
    """A snapshot, and what is known of it.

    Attributes:
        usual: What the detector knew then; an earlier state has another loss.
        proven: It is sound whatever its age: the run began with it, or returned to it.
        tried: The run has returned to it before.
    """

    snapshot: Snapshot
    usual: dict[str, Any]
    proven: bool = False
    tried: bool = False

    @property
    def step(self) -> int:
        return self.snapshot.clock.step

    @property
    def name(self) -> str:
        return f"snapshot of step {self.step}"


class RollbackPoints:
    """Takes snapshots and says which one is old enough.

    Args:
        every: Optimiser steps between snapshots.
        number: How many are kept.
        age: Steps after which one is taken to be older than the damage.
        detector: Goes back with the run.

    Raises:
        UserError: No snapshot would ever be old enough.
    """

    def __init__(self, every: int, number: int, age: int, detector: SpikeDetector):
        if every < 1 or number < 2 or not 0 <= age <= every * (number - 1):
            raise UserError(
                f"NaNRollback snapshot_every {every}, snapshots {number}, age {age}; expected 1 or "
                "more, 2 or more, and an age up to snapshot_every x (snapshots - 1)"
            )
        self.every, self.number, self.age = every, number, age
        self.detector = detector
        self._kept: list[_Point] = []
        self._tried: set[str] = set()  # keys of checkpoints

    def begin(self, trainer: Any, pl_module: Any) -> None:
        """A run goes on from a state that was verified."""
        self._lineage = getattr(pl_module, "lineage", None) or 0
        usual = self.detector.state_dict()
        self._kept = [_Point(Snapshot(trainer, pl_module), usual, proven=True)]

    def take_if_due(self, trainer: Any, pl_module: Any) -> None:
        step = trainer.global_step
        if step % self.every or (self._kept and self._kept[-1].step >= step):
            return
        with trainer.profiler.profile("save_checkpoint"):
            if len(self._kept) == self.number:
                snapshot = self._kept.pop(0).snapshot
                snapshot.take(trainer, pl_module)
            else:
                snapshot = Snapshot(trainer, pl_module)
        sound = torch.tensor(float(snapshot.is_finite()), device=trainer.strategy.root_device)
        if float(reduce_processes(trainer, sound, "mean")) == 1:
            self._kept.append(_Point(snapshot, self.detector.state_dict()))
        else:
            record(trainer, "snapshot_not_finite", "a weight or a moment is not finite")

    def choose(self, trainer: Any) -> _Point | Path | None:
        """The newest state that is old enough and was not tried; all ranks choose the same."""
        step = trainer.global_step
        for i in reversed(range(len(self._kept))):
            point = self._kept[i]
            if not point.tried and (point.proven or step - point.step >= self.age):
                return point
        path = self._newest_checkpoint(trainer, step - self.age) if trainer.is_global_zero else None
        return trainer.strategy.broadcast(path)

    def _newest_checkpoint(self, trainer: Any, last_step: int) -> Path | None:
        """The folder of a checkpoint of the run, downloaded where it is only in the store."""
        stores = (getattr(callback, "remote", None) for callback in trainer.callbacks)
        remote = next((store for store in stores if isinstance(store, RemoteRuns)), None)
        store = replicas(Path(trainer.default_root_dir), remote)
        try:
            infos = store.list()
        except UserError as error:
            log.warning("%s", error)
            return None
        for info in reversed(infos):
            if info.manifest.step > last_step or info.key in self._tried:
                continue
            if info.manifest.lineage < self._lineage or not _is_on_the_way(trainer, info.manifest):
                continue
            try:
                return store.fetch(info)
            except (OSError, UserError) as error:
                log.warning("%s is no state to return to: %s", info.key, error)
        return None

    def restore(self, trainer: Any, pl_module: Any, point: _Point | Path) -> int | None:
        """Return to a state; newer snapshots are forgotten.

        Returns:
            Its position in the data; ``None`` if the data does not count it.
        """
        if isinstance(point, _Point):
            point.snapshot.restore(trainer, pl_module)
            self._kept = [p for p in self._kept if p.step <= point.step]
            point.proven = point.tried = True
            self.detector.load_state_dict(point.usual)
            return point.snapshot.clock.position
        self._tried.add(point.name)
        strategy = trainer.strategy
        checkpoint = strategy.load_checkpoint(point)
        strategy.load_model_state_dict(checkpoint)
        strategy.load_optimizer_state_dict(checkpoint)
        schedules = checkpoint.get("lr_schedulers", ())
        for config, state in zip(trainer.lr_scheduler_configs, schedules, strict=False):
            config.scheduler.load_state_dict(state)
        move_step_count(trainer, checkpoint["global_step"] - trainer.global_step)
        self.detector.reset()
        usual = self.detector.state_dict()
        self._kept = [_Point(Snapshot(trainer, pl_module), usual, proven=True, tried=True)]
        return checkpoint.get("manifest", {}).get("tokens")


def _is_on_the_way(trainer: Any, manifest: Manifest) -> bool:
    """Whether the run has passed a checkpoint's step and position, and not undone it since."""
    curriculum = getattr(getattr(trainer.datamodule, "loader", None), "curriculum", None)
    if curriculum is None:
        return True
    history = curriculum.history(manifest.tokens)
    return (history[-1].stop_step if history else 0) == manifest.step
