"""Results on disk, so that an evaluation goes on where it stopped, and as a table."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from smol.data.card import write_json
from smol.evaluation.intervals import Estimate

FILE, TABLE = "evaluation.json", "evaluation.md"
LEFT_OUT = "accuracy/"  # by group, from the printed table: there can be dozens


@dataclass(frozen=True)
class Row:
    """What one model does on one task.

    Attributes:
        model: Name of the model.
        task: Name of the task.
        digest: Of all that the result depends on; equal digests mean equal results.
        date: When it was measured, ISO 8601 in UTC.
        seconds: How long that took.
        metrics: Estimates by name.
    """

    model: str
    task: str
    digest: str
    date: str
    seconds: float
    metrics: dict[str, Estimate]


class Results:
    """The rows of an ``evaluation.json`` and the table beside it.

    A row is written when it is known, whatever other processes write to the same folder.

    Args:
        folder: Where the files are; created when there is something to write.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def rows(self) -> list[Row]:
        """The rows, oldest first; none where the file is missing or not one of ours."""
        try:
            content = json.loads((self.folder / FILE).read_text(encoding="utf-8"))
            return [_row(**row) for row in content["results"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def find(self, model: str, digest: str) -> Row | None:
        """The row of a model with a digest."""
        return next((r for r in self.rows() if (r.model, r.digest) == (model, digest)), None)

    def add(self, row: Row) -> None:
        """Write a row, in the place of an older one of the same model and task."""
        from filelock import FileLock

        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f".{FILE}.lock"):
            kept = [r for r in self.rows() if (r.model, r.task) != (row.model, row.task)]
            rows = [*kept, row]
            write_json(self.folder / FILE, {"results": [asdict(row) for row in rows]})
            (self.folder / TABLE).write_text(table(rows), encoding="utf-8")


def _row(metrics: dict[str, dict], **fields: str | float) -> Row:
    return Row(**fields, metrics={name: Estimate(**e) for name, e in metrics.items()})


def table(rows: Sequence[Row], everything: bool = True) -> str:
    """A markdown table with a column for each model, also legible as plain text.

    Args:
        rows: What to show; of equal models and tasks the last counts.
        everything: Also show accuracies by group.

    Returns:
        Lines: a value, its interval in brackets.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    cells: dict[tuple[str, str], dict[str, Estimate]] = {}
    for row in rows:
        for name, estimate in row.metrics.items():
            if everything or LEFT_OUT not in name:
                cells.setdefault((row.task, name), {})[row.model] = estimate
    tasks = list(dict.fromkeys(task for task, _ in cells))
    lines = [["task", "metric", "items", *models]]
    for task, name in sorted(cells, key=lambda key: tasks.index(key[0])):
        found = cells[task, name]
        counts = sorted({estimate.items for estimate in found.values()})
        items = "-".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        lines.append([task, name, items, *(_cell(found.get(model)) for model in models)])
    return _aligned(lines)


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    ends = (estimate.low, estimate.high)
    value = _number(estimate.value)
    return value if None in ends else f"{value} [{', '.join(map(_number, ends))}]"


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruler = ["-" * width for width in widths]

    def line(cells: Iterable[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |\n"

    return "".join(map(line, [lines[0], ruler, *lines[1:]]))
