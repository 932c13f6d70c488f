"""Evaluates what is saved, beside the training."""

import subprocess
import sys
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.events import record
from smol.errors import UserError
from smol.evaluation.tasks import load_task

LOG = "evaluation.log"


class EvaluateCheckpoints(Callback):
    """Starts ``src/evaluate.py RUN --watch``, a process that evaluates each checkpoint when saved.

    Results are in ``evaluation.json`` and ``evaluation.md`` of the run folder, what the process
    says in ``evaluation.log``. Training does not wait for it, but its end does, for the checkpoints
    that are not evaluated yet. A process that fails harms nothing and is told of at the end (event
    ``evaluation_failed``). If training dies or fails, the process finishes what is there by itself.
    A checkpoint that the rotation removes before its turn is passed over.

    .. code-block:: yaml

        callbacks:
          evaluate:
            class_path: callbacks.EvaluateCheckpoints
            init_args: {tasks: [generated], limit: 200}

    Args:
        tasks: Names in ``configs/tasks`` or YAML files.
        limit: At most so many records of each task; null for all.
        device: Where to compute, such as ``cuda:1``.
        patience: Seconds that the end of training waits.
    """

    order = 500

    def __init__(
        self,
        tasks: list[str],
        limit: int | None = None,
        device: str = "cpu",
        patience: float = 600.0,
    ):
        if not tasks:
            raise UserError("EvaluateCheckpoints tasks is empty, expected one or more")
        for name in tasks:
            load_task(name)  # a mistake is told before the training begins
        self.options = ["--tasks", *tasks, "--device", device]
        self.options += [] if limit is None else ["--limit", str(limit)]
        self.patience = patience
        self._process: subprocess.Popen | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        run = Path(trainer.default_root_dir).absolute()
        script = Path(sys.modules["smol"].__file__).parents[1] / "evaluate.py"
        run.mkdir(parents=True, exist_ok=True)
        with open(run / LOG, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(script), str(run), "--watch", *self.options],
                stdin=subprocess.PIPE,  # it ends when this does
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is meant for the training
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.stdin.close()
        try:
            status = process.wait(self.patience)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            status = f"stopped after {self.patience:g} seconds"
        if status:
            said = Path(trainer.default_root_dir, LOG).read_text(encoding="utf-8").splitlines()
            record(trainer, "evaluation_failed", f"{said[-1] if said else ''} ({status})")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self._process is not None:  # it finishes what is there by itself
            self._process.stdin.close()
            self._process = None
