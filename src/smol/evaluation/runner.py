"""Evaluating a model on several tasks, or a run's checkpoints as they come."""

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smol.errors import UserError, one_line
from smol.evaluation.model_folder import ModelFolder, find_model
from smol.evaluation.results import Results, Row
from smol.evaluation.tasks import Task
from smol.paths import find

if TYPE_CHECKING:
    from smol.evaluation.language_model import LanguageModel

POLL_SECONDS = 2.0
KEYS = ("limit", "modes", "dtype", "max_length", "tokenizer")  # what decides over the results


@dataclass(frozen=True)
class Settings:
    """How to evaluate.

    Attributes:
        tasks: The tasks.
        limit: At most so many records of each.
        modes: Of chats; see :func:`smol.evaluation.measure.measure`.
        out: Folder of the results; ``None`` for that of each model.
        device: Where to compute.
        dtype: Of the weights; ``None`` keeps what they are stored in.
        max_length: How many tokens a model may read; ``None`` for what it was trained with.
        tokenizer: Folder, where it is not the one that goes with the model.
        batch_size: How many answers to write at a time.
        force: Measure again what is there already.
        log: Receives what is worth a line.
    """

    tasks: Sequence[Task]
    limit: int | None = None
    modes: tuple[str, ...] = ()
    out: Path | None = None
    device: str = "cpu"
    dtype: str | None = None
    max_length: int | None = None
    tokenizer: str | None = None
    batch_size: int = 16
    force: bool = False
    log: Callable[[str], None] = field(default=print, compare=False)

    @property
    def changed(self) -> dict[str, Any]:
        """What decides over the results and is not as by default."""
        return {key: value for key in KEYS if (value := getattr(self, key)) not in (None, ())}


def evaluate_model(folder: ModelFolder, settings: Settings) -> list[Row]:
    """Measure a model on all tasks, and write each result when it is known.

    Returns:
        A row for each task, in their order.

    Raises:
        UserError: If the model or a task is not as it should be.
    """
    results, rows, model = Results(settings.out or folder.results), [], None
    for task in settings.tasks:
        digest = _digest(task, folder, settings)
        row = results.find(folder.name, digest)  # a damaged file is told before measuring
        if row is None or settings.force:
            if model is None:
                model = _load(folder, settings)
            row = _measured(task, model, folder, digest, settings)
            results.add(row)
            settings.log(f"{folder.name}: {task.name}, {row.seconds:.1f} s")
        else:
            settings.log(f"{folder.name}: {task.name} is there already")
        rows.append(row)
    return rows


def _load(folder: ModelFolder, settings: Settings) -> "LanguageModel":
    import torch

    from smol.evaluation.language_model import load_language_model

    dtype = settings.dtype and getattr(torch, settings.dtype)
    return load_language_model(
        folder, settings.device, dtype, settings.max_length, settings.batch_size
    )


def _measured(
    task: Task, model: "LanguageModel", folder: ModelFolder, digest: str, settings: Settings
) -> Row:
    from smol.evaluation.measure import measure

    began = time.perf_counter()
    metrics = measure(task, model, settings.limit, settings.modes)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    seconds = time.perf_counter() - began
    facts = (folder.name, task.name, folder.fingerprint, settings.changed, digest)
    return Row(*facts, date, seconds, metrics)


def _digest(task: Task, folder: ModelFolder, settings: Settings) -> str:
    facts = [
        asdict(task),
        task.inputs(),
        folder.fingerprint,
        *(getattr(settings, key) for key in KEYS),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def watch(run: str, settings: Settings) -> None:
    """Evaluate each checkpoint of a run when it is committed.

    It ends when standard input does and all that is there has been evaluated; so a callback, or
    ``< /dev/null``, decides how long it lasts. Of a checkpoint that the rotation has removed before
    its turn nothing is known; one that fails is told of, and the next one is evaluated.

    Args:
        run: Folder of the run; it need not hold a checkpoint yet.
        settings: How to evaluate.

    Raises:
        UserError: If the folder is no run's; or at the end, if a checkpoint failed.
    """
    from smol.checkpoints.store import MARKER_FILE, FsspecStore
    from smol.runs import CHECKPOINTS

    _check_run(Path(find(run)), run)
    failed = []
    os.nice(10)  # the training goes first
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    store, seen = FsspecStore(Path(find(run)) / CHECKPOINTS), set()
    while True:
        last_look = ended.is_set()
        for info in store.list():
            if info.key in seen:
                continue
            seen.add(info.key)
            try:
                evaluate_model(find_model(info.location, settings.tokenizer), settings)
            except Exception as error:  # the next checkpoint may be better
                if not Path(info.location, MARKER_FILE).is_file():  # removed first of all files
                    settings.log(f"{info.key} was removed before its turn ({type(error).__name__})")
                    continue
                reason = str(error) if isinstance(error, UserError) else one_line(error)
                failed.append(f"{info.key} could not be evaluated: {reason}")
                settings.log(failed[-1])
        if last_look:
            break
        ended.wait(POLL_SECONDS)
    if failed:
        raise UserError(f"{failed[-1]} ({len(failed)} of {len(seen)} checkpoints failed)")


def _check_run(folder: Path, name: str) -> None:
    """See that a folder is a run's, or is one in which a run has yet to begin."""
    from smol.runs import CHECKPOINTS

    if not folder.is_dir():
        raise UserError(f"{name} is not there; expected a run's folder")
    own = (CHECKPOINTS, "config.yaml", "tokenizer")
    others = [path for path in folder.iterdir() if not path.name.startswith("evaluation")]
    if others and not any((folder / name).exists() for name in own):
        raise UserError(
            f"{name} is no run's folder, expected {CHECKPOINTS}/ or config.yaml in it; --watch is "
            "for runs, leave it out for other models"
        )
