"""Loggers that a restarted run continues without doubling rows.

A module tells its loggers the step it goes on from (``rewind``); what they have logged beyond it
belongs to a future that did not happen.
"""

import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger as LightningTensorBoardLogger
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from smol.paths import resolve


class CSVLogger(Logger):
    """One row per optimiser step in ``metrics.csv``; a new metric adds a column.

    Args:
        save_dir: The run folder.
        filename: Name of the file in it.
    """

    def __init__(self, save_dir: str, filename: str = "metrics.csv"):
        super().__init__()
        self._dir = Path(resolve(save_dir))
        self.path = self._dir / filename
        self._columns: list[str] = ["step"]
        self._last: dict[str, Any] = {}
        self._last_offset = 0  # where the last row begins
        if self.path.exists():
            self._take_over()

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self._dir)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Hyper-parameters are in the run folder's ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write the metrics of a step; those of the same step share a row."""
        step = int(step or 0)
        values = {key: value for key, value in metrics.items() if key != "epoch"}
        row = {"step": step} | values
        if self._last.get("step") == step:
            row = self._last | row
        new = [key for key in row if key not in self._columns]
        if new:
            rows = self.rows()
            self._columns += new
            self._write_all([r for r in rows if int(r["step"]) != step])
        elif not self.path.exists():
            self._write_all([])
        with open(self.path, "r+b") as file:
            same = self._last.get("step") == step and not new
            offset = self._last_offset if same else file.seek(0, os.SEEK_END)
            file.seek(offset)
            file.truncate()
            file.write(self._line(row))
        self._last, self._last_offset = row, offset

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Forget the rows after ``step``."""
        self._last = {}
        if self.path.exists():
            self._write_all([row for row in self.rows() if int(row["step"]) <= step])
            self._take_over()

    def rows(self) -> list[dict[str, str]]:
        """All rows, as text by column."""
        if not self.path.exists():
            return []
        # What follows the last end of a line was cut off by a crash.
        whole = self.path.read_text(encoding="utf-8").rpartition("\n")[0]
        return list(csv.DictReader(whole.splitlines()))

    def _take_over(self) -> None:
        rows = self.rows()
        with open(self.path, newline="", encoding="utf-8") as file:
            self._columns = next(csv.reader(file), None) or ["step"]
        self._write_all(rows)
        if rows:
            self._last = {key: value for key, value in rows[-1].items() if value} | {
                "step": int(rows[-1]["step"])
            }
            self._last_offset = self.path.stat().st_size - len(self._line(rows[-1]))

    def _line(self, row: dict[str, Any]) -> bytes:
        line = io.StringIO()
        csv.DictWriter(line, self._columns, lineterminator="\n").writerow(row)
        return line.getvalue().encode()

    def _write_all(self, rows: list[dict[str, Any]]) -> None:
        self._dir.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        header = dict(zip(self._columns, self._columns, strict=True))
        part.write_bytes(b"".join(self._line(row) for row in [header, *rows]))
        part.replace(self.path)
        self._last = {} if not rows else self._last


class WandbLogger(LightningWandbLogger):
    """Weights & Biases; a restarted run goes on as the same W&B run.

    W&B keeps what it has been sent, so steps that a run repeats, after a restart or a rollback, are
    not sent again.

    Args:
        save_dir: The run folder; the W&B run's id is kept in it.
        kwargs: See Lightning's ``WandbLogger``.
    """

    def __init__(self, save_dir: str, **kwargs: Any):
        folder = Path(resolve(save_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self._state = folder / "wandb_run.txt"
        run_id, self._sent_before = kwargs.pop("id", None), -1
        if self._state.exists() and (state := self._state.read_text().split()):
            run_id, self._sent_before = state[0], int(state[1])
        self._sent = self._sent_before
        super().__init__(save_dir=str(folder), id=run_id, resume="allow", **kwargs)

    def rewind(self, step: int) -> None:
        """Send nothing of the steps that come again."""
        self._sent_before = max(self._sent_before, self._sent)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if step is not None and step <= self._sent_before:
            return
        super().log_metrics(metrics, step)
        if step is not None:
            self._sent = step
            part = self._state.with_suffix(".part")
            part.write_text(f"{self.experiment.id} {step}\n")
            part.replace(self._state)


class TensorBoardLogger(LightningTensorBoardLogger):
    """TensorBoard; a restarted run hides the events after the step it goes on from.

    Args:
        save_dir: The run folder.
        kwargs: See Lightning's ``TensorBoardLogger``.
    """

    def __init__(self, save_dir: str, **kwargs: Any):
        super().__init__(str(resolve(save_dir)), name="tensorboard", version="", **kwargs)

    def rewind(self, step: int) -> None:
        """Events after ``step`` are purged by the next writer, which the next event opens."""
        self._kwargs["purge_step"] = step + 1
        if self._experiment is not None:
            self._experiment.close()
            self._experiment = None
