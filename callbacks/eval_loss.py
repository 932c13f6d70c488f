"""Held-out loss, by source and by position, before a run and after."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

from smol.evaluation.loss_by_position import LossByPosition
from smol.experiments.plots import plot_loss_by_position

BATCH = ("targets", "positions", "sources")


class EvalLoss(Callback):
    """Logs ``held_out/loss/<source>``, writes loss by position, and validates before a run begins.

    Losses are nats per token of text. After every validation ``loss_by_position.json`` in the run
    folder holds ``before`` (the first one of the run, ``null`` without ``at_start``) and ``after``
    (the newest), each with its step and with what
    :class:`~smol.evaluation.loss_by_position.LossByPosition` measures; at the end of training
    ``loss_by_position.png`` shows both. A position is the place of a token in its document as seen
    in its block: a document that was cut at the edge of a block begins there. The command
    ``validate`` writes ``loss_by_position_validate.json`` and ``.png``.

    The validation before the first step happens once per run name: a restart does not repeat it, a
    run that continues another does its own. What comes after it is bit-identical with and without.

    The module's ``validation_step`` must return a dictionary with ``nll``, the negative
    log-likelihood of each token; the batch needs ``targets``, ``positions`` and ``sources``, the
    data ``source_names``. Elsewhere there is only the validation before the first step.

    .. code-block:: yaml

        callbacks:
          eval_loss:
            class_path: callbacks.EvalLoss
            init_args: {at_start: true}

    Args:
        at_start: Validate before the first step of a run.

    Attributes:
        before: ``step``, ``metrics`` by name and, if measured, ``loss_by_position`` of the
            validation before the first step; ``None`` without one.
    """

    order = 200

    def __init__(self, at_start: bool = True):
        self.at_start = at_start
        self.before: dict[str, Any] | None = None
        self._run: str | None = None
        self._metric: LossByPosition | None = None
        self._measured: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule
        names = getattr(data, "source_names", None)
        tokenizer = getattr(data, "tokenizer", None)
        self._metric = LossByPosition(names, tokenizer) if names else None
        if self._metric is not None:
            self._metric.process_group = getattr(trainer.strategy, "data_parallel_group", None)
        self._measured = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = Path(trainer.default_root_dir).name
        if run == self._run:
            return
        self._run, self.before = run, None
        if self.at_start and trainer.enable_validation and trainer.global_step == self._first_step:
            metrics = validate(trainer)
            self.before = {"step": trainer.global_step, "metrics": metrics}
            self.before["loss_by_position"] = self._measured
            self._write(trainer)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._metric is not None:
            self._metric.to(pl_module.device).reset()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        nll = outputs.get("nll") if isinstance(outputs, dict) else None
        if self._metric is None or nll is None or not all(hasattr(batch, key) for key in BATCH):
            return
        self._metric.update(nll, *(getattr(batch, key) for key in BATCH))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._metric is None or not self._metric.update_called or trainer.sanity_checking:
            return
        measured = self._metric.compute()
        self._measured = {"step": trainer.global_step} | measured
        losses = {f"held_out/loss/{k}": v["loss"] for k, v in measured["sources"].items()}
        # Equal on all ranks already; Lightning warns of what it is not told to average.
        pl_module.log_dict(losses, sync_dist=True)
        self._write(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._draw(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)  # after the last checkpoint: a failure here costs none

    def picture(self, trainer: Trainer) -> Path | None:
        """Where the picture is once the command has ended; ``None`` if nothing was measured."""
        return None if self._measured is None else self._file(trainer, "png")

    def _file(self, trainer: Trainer, suffix: str) -> Path:
        command = "" if trainer.state.fn == TrainerFn.FITTING else "_validate"
        return Path(trainer.default_root_dir, f"loss_by_position{command}.{suffix}")

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and self._measured is not None:
            file = self._file(trainer, "json")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(self._before_and_after(trainer), indent=1) + "\n")

    def _draw(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and (picture := self.picture(trainer)):
            name = picture.parent.name
            plot_loss_by_position(**self._before_and_after(trainer), picture=picture, title=name)

    def _before_and_after(self, trainer: Trainer) -> dict[str, Any]:
        fitting = trainer.state.fn == TrainerFn.FITTING
        before = self.before["loss_by_position"] if self.before and fitting else None
        return {"before": before, "after": self._measured}

    def state_dict(self) -> dict[str, Any]:
        return {"run": self._run, "before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._run, self.before = state_dict["run"], state_dict["before"]


def validate(trainer: Trainer) -> dict[str, float]:
    """Validate now, as the training loop does between two steps; no random number is used up.

    Returns:
        What was logged, by name.
    """
    connector = trainer._logger_connector
    first_iteration = connector._first_loop_iter
    trainer.validating = True
    with isolate_rng():  # a DataLoader draws a seed whenever it begins
        logged = trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first_iteration
    return {name: float(value) for metrics in logged for name, value in metrics.items()}
