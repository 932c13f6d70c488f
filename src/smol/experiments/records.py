"""What the folder of a run tells of it."""

import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from smol.config import parse_yaml
from smol.errors import UserError, nearest, one_line
from smol.experiments.plots import read_metrics
from smol.paths import find, project_root, resolve

METRICS, EVENTS, ENVIRONMENT = "metrics.csv", "events.jsonl", "environment.json"
CONFIG, SOURCE = "config.yaml", "config.source.yaml"
PRIVATE = "storage_options"  # may hold credentials, and a report is passed on

Series = tuple[list[float], list[float]]
Metrics = Mapping[str, Series]


@dataclass(frozen=True)
class RunRecord:
    """A run, read from its folder; what a run has not written is empty.

    Attributes:
        folder: The folder of the run.
        metrics: What was logged, by name: steps and values.
    """

    folder: Path
    metrics: Metrics

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def steps(self) -> int:
        """The last step that something was logged of."""
        return int(max(steps[-1] for steps, _ in self.metrics.values()))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The complete configuration."""
        return self._yaml(CONFIG)

    @cached_property
    def source(self) -> dict[str, Any]:
        """The files and flags merged, with their interpolations."""
        return self._yaml(SOURCE)

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The lines of ``events.jsonl``; those that a crash cut off are left out."""
        found = []
        for line in self.text(EVENTS).splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and {"step", "kind", "message"} <= event.keys():
                found.append(event)
        return found

    def text(self, name: str) -> str:
        """A text file of the run; empty if it is missing."""
        file = self.folder / name
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; empty if it is missing, damaged or no mapping."""
        try:
            value = json.loads(self.text(name))
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def _yaml(self, name: str) -> dict[str, Any]:
        value = parse_yaml(self.text(name), str(self.folder / name))
        return value if isinstance(value, dict) else {}


def read_run(run: str | Path) -> RunRecord:
    """Read a run.

    Args:
        run: The folder of a run, or the name of one in ``runs``.

    Raises:
        UserError: There is no such run, or it has logged nothing yet.
    """
    folder = _folder(run)
    file = folder / METRICS
    try:
        metrics = read_metrics(file) if file.is_file() else {}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file} is damaged ({one_line(error)}), expected numbers by step"
        ) from None
    if metrics:
        return RunRecord(folder, metrics)
    if (folder / CONFIG).is_file():
        raise UserError(
            f"the run '{folder.name}' has no metrics in {file} yet; they come with its first log "
            "line, if its logger is smol.experiments.CSVLogger"
        )
    raise UserError(f"{folder} is no run: it has no {METRICS}; expected what src/train.py fit made")


def _folder(run: str | Path) -> Path:
    runs = Path(resolve("runs"))
    for folder in (Path(find(run)), runs / run):
        if folder.is_dir():
            return folder.resolve()
    known = [folder.name for folder in runs.glob("*") if (folder / METRICS).is_file()]
    raise UserError(
        f"there is no run {run}, neither as a folder nor in {runs}.{nearest(str(run), known)}"
    )


def settings(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a configuration by dotted key, without what may be private."""
    if not isinstance(config, Mapping) or not config:
        yield prefix, config
        return
    for key, value in config.items():
        if key != PRIVATE:
            yield from settings(value, f"{prefix}.{key}" if prefix else str(key))


def environment() -> dict[str, str]:
    """Date, versions, commit and machine of this process, by name."""
    import lightning
    import torch

    gpus = torch.cuda.device_count()
    said = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "system": platform.platform(),
        "device": f"{gpus} x {torch.cuda.get_device_name()}" if gpus else platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
    return {name: value for name, value in said.items() if value}


def _commit() -> str:
    """The commit of the repository, and whether files differ from it; empty without git."""
    command = ["git", "-C", str(project_root()), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
