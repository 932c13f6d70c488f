"""Keeps numbers that are not finite, and spikes, out of the weights."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from callbacks.events import record
from callbacks.parts.collectives import reduce_processes
from callbacks.parts.forensics import end_diverged, find_non_finite, first_non_finite_module
from callbacks.parts.rollback_points import RollbackPoints
from callbacks.parts.spike_detector import SpikeDetector, regime_of
from smol.errors import UserError
from smol.modules.snapshot import Clock
from smol.modules.steps import forget_last_row, rewind_loggers
from smol.optim import gradient_norm


class NaNRollback(Callback):
    """Drops a bad optimiser step; when it comes back, returns to an earlier state and other data.

    A step is bad when the loss of any micro-batch or the gradient norm is not finite on any
    process, or when either is a spike: its robust z-score (median and median deviation of the last
    accepted steps; of the norm, the logarithm's) is above a threshold. All processes learn of it by
    one all-reduced pair of numbers, before the step can touch a weight or a moment.

    1. A bad step is dropped: its data counts as read; it is no step and no tick of the schedule.
    2. A second one within ``recurs`` steps undoes what may have caused it: back to the newest
       snapshot in memory that is ``age`` steps old, to an older one when that was tried before, or
       else to a checkpoint of the run, here or in its store. What was read since is left out.
    3. From the second rollback within ``budget_steps`` the learning rate is cut, in modules that
       multiply it with their ``learning_rate_scale``, as this project's do. After
       ``max_rollbacks`` the run ends, and leaves a folder ``nan_rollback/step-...`` with the
       micro-batches, norms and the first module whose output is not finite.

    After either all goes on as in a run whose data never held what was read in between. Each is an
    event. A snapshot takes, with AdamW, 12 bytes of the host's memory for each parameter.

    .. code-block:: yaml

        callbacks:
          nan_rollback:
            class_path: callbacks.NaNRollback
            init_args: {spike: 10.0, snapshot_every: 100, max_rollbacks: 3}

    Args:
        spike: Threshold of the z-score; ``null`` for numbers that are not finite only.
        window: Accepted steps that a step is compared with.
        warmup: Accepted steps, from the start and after every change of stage or context, before
            anything is a spike.
        recurs: A bad step within so many attempts after another has come back.
        snapshot_every: Steps between snapshots.
        snapshots: How many are kept, at least 2.
        age: Steps after which a snapshot is taken to be older than the damage.
        max_rollbacks: Rollbacks within ``budget_steps`` attempts.
        budget_steps: See ``max_rollbacks``.
        learning_rate_cut: Factor of the learning rate, kept until the end of the run.
    """

    order = 100

    def __init__(
        self,
        spike: float | None = 10.0,
        window: int = 128,
        warmup: int = 64,
        recurs: int = 10,
        snapshot_every: int = 100,
        snapshots: int = 2,
        age: int = 20,
        max_rollbacks: int = 3,
        budget_steps: int = 1000,
        learning_rate_cut: float = 0.5,
    ):
        if recurs < 1:
            raise UserError(f"NaNRollback recurs is {recurs}, expected at least 1")
        self.recurs, self.max_rollbacks, self.budget_steps = recurs, max_rollbacks, budget_steps
        self.learning_rate_cut, self.learning_rate_scale = learning_rate_cut, 1.0
        self.detector = SpikeDetector(spike, window, warmup)
        self.points = RollbackPoints(snapshot_every, snapshots, age, self.detector)
        self.attempts = self.dropped = 0
        self.rollbacks: list[int] = []  # attempts that ended in one
        self._last_bad: int | None = None
        self._losses, self._batches = [], []
        self._verdict: dict[str, Any] | None = None
        self._point: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise UserError("NaNRollback cannot judge losses that are scaled; use bf16-mixed")
        self._losses, self._batches, self._verdict = [], [], None
        pl_module.learning_rate_scale = self.learning_rate_scale
        self.points.begin(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._batches:
            self.points.take_if_due(trainer, pl_module)
            self._before = Clock(trainer)
            self.detector.begin(regime_of(trainer, batch))
        self._batches.append(batch)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._losses.append(loss.detach().float())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if not self._losses or getattr(pl_module, "step_is_dropped", False):
            return  # a module may have nothing to learn from a batch
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = getattr(pl_module, "gradient_norm", lambda: gradient_norm(parameters))()
        loss = torch.stack(self._losses).sum()
        sums = torch.stack([loss, norm.to(loss)])  # a norm of offloaded gradients is on the host
        # Not a number if any of them is none.
        loss, norm = reduce_processes(trainer, sums, "mean").tolist()
        self.attempts += 1
        reason = self.detector.judge(loss, norm)
        if reason is None:
            return
        again = self._last_bad is not None and self.attempts - self._last_bad <= self.recurs
        self._last_bad = self.attempts
        self._verdict = {"reason": reason, "loss": loss, "gradient_norm": norm}
        self._verdict |= find_non_finite(trainer, pl_module, self._losses)
        self._point = self._point_to_return_to(trainer, pl_module) if again else None
        getattr(pl_module, "drop_step", lambda: None)()
        for parameter in parameters:
            parameter.grad = None  # the optimiser passes over it

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        verdict, self._verdict = self._verdict, None
        self._losses, self._batches = [], []
        if verdict is None:
            if trainer.global_step % trainer.log_every_n_steps == 0:
                pl_module.log("nan_rollback/dropped_steps", float(self.dropped))
                pl_module.log("nan_rollback/rollbacks", float(len(self.rollbacks)))
        elif self._point is None:
            self._before.restore(trainer)
            forget_last_row(trainer)
            self.dropped += 1
            record(trainer, "dropped_step", verdict["reason"], **verdict)
        else:
            self._roll_back(trainer, pl_module, verdict)

    def _point_to_return_to(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """The state to go back to; ends the run where there is none left."""
        with trainer.precision_plugin.train_step_context():
            module = first_non_finite_module(pl_module, self._batches)
        self._verdict["first_non_finite_module"] = module
        recent = [a for a in self.rollbacks if self.attempts - a < self.budget_steps]
        point = self.points.choose(trainer)
        if point is not None and len(recent) < self.max_rollbacks:
            if recent:
                self.learning_rate_scale *= self.learning_rate_cut
            return point
        spent = len(recent) >= self.max_rollbacks and f"{len(recent)} rollbacks"
        self._verdict["why"] = spent or "no state is left to go back to"
        end_diverged(trainer, pl_module, self._batches, self._verdict)

    def _roll_back(
        self, trainer: Trainer, pl_module: LightningModule, verdict: dict[str, Any]
    ) -> None:
        step, data = trainer.global_step, trainer.datamodule
        position = self.points.restore(trainer, pl_module, self._point)
        if hasattr(data, "skip"):
            data.skip(position, data.loader.position)
        pl_module.lineage = (getattr(pl_module, "lineage", None) or 0) + 1  # new saves are newer
        pl_module.learning_rate_scale = self.learning_rate_scale
        rewind_loggers(trainer)
        self.rollbacks.append(self.attempts)
        self._last_bad = None
        point, scale = self._point.name, self.learning_rate_scale
        verdict |= {"from_step": step, "returned_to": point, "learning_rate_scale": scale}
        message = f"from step {step:,} to {point}, other data: {verdict['reason']}"
        record(trainer, "rollback", message, **verdict)

    def state_dict(self) -> dict[str, Any]:
        return {
            "attempts": self.attempts,
            "dropped": self.dropped,
            "rollbacks": self.rollbacks,
            "last_bad": self._last_bad,
            "learning_rate_scale": self.learning_rate_scale,
            "detector": self.detector.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.attempts, self.dropped = state_dict["attempts"], state_dict["dropped"]
        self.rollbacks, self._last_bad = list(state_dict["rollbacks"]), state_dict["last_bad"]
        self.learning_rate_scale = state_dict["learning_rate_scale"]
        self.detector.load_state_dict(state_dict["detector"])
