"""What the model can do, measured while it trains."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.events import record
from smol.errors import UserError, one_line
from smol.evaluation.language_model import LanguageModel
from smol.evaluation.measure import Metrics, check, check_modes, measure
from smol.evaluation.tasks import Task, load_task


class EvaluateTasks(Callback):
    """Logs ``tasks/<task>/<metric>`` of tasks, every so many steps and when training ends.

    Tasks are those of ``src/evaluate.py``; accuracies by group are left out. Training waits, and
    goes on bit-identically with and without; to measure beside it, see
    :class:`~callbacks.evaluate_checkpoints.EvaluateCheckpoints`. Of several processes all measure
    the same. Needs a module with a ``decoder`` and data with a ``tokenizer`` and a
    ``context_length``; with any others nothing is measured. A mistake in a task is told before the
    first step; what fails later is an event ``evaluation_failed``, and training goes on.

    .. code-block:: yaml

        callbacks:
          evaluate_tasks:
            class_path: callbacks.EvaluateTasks
            init_args: {tasks: [generated], every: 100, limit: 50}

    Args:
        tasks: Names in ``configs/tasks`` or YAML files.
        every: Optimiser steps between measurements; 0 measures only at the end.
        limit: At most so many records of each task; null for all.
        modes: Of chat tasks: think, no_think or both.

    Attributes:
        metrics: The newest figures by name; empty before the first.
    """

    order = 200

    def __init__(
        self,
        tasks: list[str],
        every: int = 500,
        limit: int | None = 100,
        modes: Sequence[str] = ("no_think", "think"),
    ):
        if not tasks:
            raise UserError("EvaluateTasks tasks is empty, expected at least one, as [arc_easy]")
        if every < 0:
            raise UserError(f"EvaluateTasks every is {every}, expected 0 or more optimiser steps")
        if limit is not None and limit < 1:
            raise UserError(f"EvaluateTasks limit is {limit}, expected 1 or more, or null")
        check_modes(modes)
        self.tasks = [load_task(name) for name in tasks]
        self.every, self.limit, self.modes = every, limit, tuple(modes)
        self.metrics: dict[str, float] = {}
        self._measured_at: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        model = _language_model(trainer, pl_module)
        for task in self.tasks if model else ():
            check(task, model, self.limit, self._modes(task))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        moved = step > self._step
        self._step = min(step, self._step)  # a rollback measures again on the other way
        if self.every and moved and step % self.every == 0:
            self._measure(trainer, pl_module)
            self._step = step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._measured_at:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measured_at = trainer.global_step
        model = _language_model(trainer, pl_module)
        if model is None:
            return
        try:
            with (
                trainer.profiler.profile("evaluate_tasks"),
                trainer.precision_plugin.forward_context(),
                _evaluating(pl_module),
            ):
                self.metrics = {
                    f"tasks/{task.name}/{name}": estimate.value
                    for task in self.tasks
                    for name, estimate in self._estimates(task, model).items()
                    if "accuracy/" not in name
                }
        except Exception as error:  # such as memory that does not suffice: training goes first
            reason = str(error) if isinstance(error, UserError) else one_line(error)
            record(trainer, "evaluation_failed", reason)
            return
        for logger in trainer.loggers:  # at this step, whatever log_every_n_steps says
            logger.log_metrics(self.metrics, step=trainer.global_step)

    def _estimates(self, task: Task, model: LanguageModel) -> Metrics:
        return measure(task, model, self.limit, self._modes(task))

    def _modes(self, task: Task) -> tuple[str, ...]:
        return self.modes if task.kind == "chat" else ()


def _language_model(trainer: Trainer, module: LightningModule) -> LanguageModel | None:
    """What is trained, as evaluation sees it; ``None`` for what is no language model."""
    data = trainer.datamodule
    decoder, tokenizer = getattr(module, "decoder", None), getattr(data, "tokenizer", None)
    context = getattr(data, "context_length", None)
    if decoder is None or tokenizer is None or context is None:
        return None
    return LanguageModel(
        decoder,
        tokenizer,
        Path(trainer.default_root_dir).name,
        (tokenizer.eos_id,),  # a text begins after the end of the one before it
        context,
        data.chat_template() if hasattr(data, "chat_template") else None,
    )


@contextmanager
def _evaluating(module: LightningModule) -> Iterator[None]:
    """No dropout, and nothing compiled for lengths that differ at each call."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for part, training in modes:
            part.training = training
