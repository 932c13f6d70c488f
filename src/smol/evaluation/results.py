"""Results on disk, so that an evaluation goes on where it stopped, and as a table."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from smol.data.card import write_json
from smol.errors import UserError, one_line
from smol.evaluation.intervals import Estimate

FILE, TABLE = "evaluation.json", "evaluation.md"
LEFT_OUT = "accuracy/"  # by group, from the printed table: there can be dozens


@dataclass(frozen=True)
class Row:
    """What one model does on one task.

    Attributes:
        model: Name of the model.
        task: Name of the task.
        weights: Fingerprint of the model: models of one name may differ.
        settings: What was not as by default, by name, such as ``{"limit": 100}``.
        digest: Of all that the result depends on; equal digests mean equal results.
        date: When it was measured, ISO 8601 in UTC.
        seconds: How long that took.
        metrics: Estimates by name.
    """

    model: str
    task: str
    weights: str
    settings: dict[str, Any]
    digest: str
    date: str
    seconds: float
    metrics: dict[str, Estimate]

    @property
    def label(self) -> str:
        """The model and the settings that are not as by default."""
        settings = (
            f"{name}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}"
            for name, value in self.settings.items()
        )
        return " ".join((self.model, *settings))


class Results:
    """The rows of an ``evaluation.json`` and the table beside it.

    A row is written when it is known, whatever other processes write to the same folder.

    Args:
        folder: Where the files are; created when there is something to write.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def rows(self) -> list[Row]:
        """The rows, oldest first; none where the file is missing.

        Raises:
            UserError: If the file is there and damaged or not one of ours, or the folder is a file.
        """
        file = self.folder / FILE
        try:
            return [_row(**row) for row in json.loads(file.read_text("utf-8"))["results"]]
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            raise UserError(f"{self.folder} is or lies in a file, expected a folder") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file} is damaged or no file of results ({one_line(error)}); move it away, or "
                "name another folder with --out"
            ) from None

    def find(self, model: str, digest: str) -> Row | None:
        """The row with a digest, under the name that the model has now."""
        found = next((row for row in self.rows() if row.digest == digest), None)
        return found and replace(found, model=model)

    def add(self, row: Row) -> None:
        """Write a row, in the place of an older one of the same weights, task and settings.

        Raises:
            UserError: As :meth:`rows`.
        """
        from filelock import FileLock

        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f".{FILE}.lock"):
            kept = [r for r in self.rows() if _key(r) != _key(row)]
            rows = [*kept, row]
            write_json(self.folder / FILE, {"results": [asdict(row) for row in rows]})
            (self.folder / TABLE).write_text(table(rows), encoding="utf-8")


def _key(row: Row) -> tuple[str, str, str]:
    return row.weights, row.task, json.dumps(row.settings, sort_keys=True)


def _row(metrics: dict[str, dict], **fields: str | float) -> Row:
    return Row(**fields, metrics={name: Estimate(**e) for name, e in metrics.items()})


def table(rows: Sequence[Row], everything: bool = True) -> str:
    """A markdown table with a column for each model and its settings, also legible as plain text.

    Args:
        rows: What to show; of equal models, settings and tasks the last counts. Different models of
            one name have the beginning of their fingerprints beside it.
        everything: Also show accuracies by group.

    Returns:
        Lines: a value, its interval in brackets.
    """
    columns = list(dict.fromkeys((row.label, row.weights) for row in rows))
    labels = [label for label, _ in columns]
    heads = [
        label if labels.count(label) == 1 else f"{label} #{weights[:8]}"
        for label, weights in columns
    ]
    cells: dict[tuple[str, str], dict[tuple[str, str], Estimate]] = {}
    for row in rows:
        for name, estimate in row.metrics.items():
            if everything or LEFT_OUT not in name:
                cells.setdefault((row.task, name), {})[row.label, row.weights] = estimate
    tasks = list(dict.fromkeys(task for task, _ in cells))
    lines = [["task", "metric", "items", *heads]]
    for task, name in sorted(cells, key=lambda key: tasks.index(key[0])):
        found = cells[task, name]
        counts = sorted({estimate.items for estimate in found.values()})
        items = "-".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        lines.append([task, name, items, *(_cell(found.get(column)) for column in columns)])
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
