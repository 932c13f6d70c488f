"""What happened to the run, one line each."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info


class Events(Callback):
    """Appends a line of JSON for everything that happens to the run, also when it is restarted.

    A line has ``time`` (UTC, ISO 8601), ``step`` (completed optimiser steps), ``tokens`` (position
    in the data, null if it has none), ``kind``, ``message`` and ``fields``. The first process
    writes. Start, end and failure are events; other callbacks add theirs with :func:`record`.

    .. code-block:: yaml

        callbacks:
          events:
            class_path: callbacks.Events
            init_args: {filename: events.jsonl}

    Args:
        filename: Name of the file in the run folder.
    """

    order = 200

    def __init__(self, filename: str = "events.jsonl"):
        self.filename = filename

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer, "start", f"training starts at step {trainer.global_step:,}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer, "end", f"training ends at step {trainer.global_step:,}")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.write(trainer, "exception", f"{type(exception).__name__}: {exception}")

    def write(self, trainer: Trainer, kind: str, message: str, **fields: Any) -> None:
        """Append an event; does nothing on any process but the first."""
        if not trainer.is_global_zero:
            return
        row = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "step": trainer.global_step,
            "tokens": getattr(getattr(trainer.datamodule, "loader", None), "position", None),
            "kind": kind,
            "message": message,
            "fields": _plain(fields),
        }
        line = json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"
        path = Path(trainer.default_root_dir, self.filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read() != b"\n":  # a crash cut the last line off; let it spoil no other
                    line = b"\n" + line
            file.write(line)


def record(trainer: Trainer, kind: str, message: str, **fields: Any) -> None:
    """Tell of an event: a log line of the first process, and a line of :class:`Events` if used.

    Args:
        trainer: Whose callbacks are searched for one.
        kind: A word to search for, as ``throttled``.
        message: One line for people.
        fields: Numbers and names for programs.
    """
    rank_zero_info(f"{kind} at step {trainer.global_step:,}: {message}")
    for callback in trainer.callbacks:
        if isinstance(callback, Events):
            callback.write(trainer, kind, message, **fields)


def _plain(value: Any) -> Any:
    """JSON has no word for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
