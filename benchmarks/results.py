"""Where figures are kept: with the date, the machine, the commit and the versions they belong to.

A measurement is a line of ``benchmarks/results/<name>.jsonl``; ``<name>.md`` shows all of them as a
table and is written anew with each.
"""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
Figures = dict[str, Any]


def record(
    name: str,
    figures: Figures | Sequence[Figures],
    packages: Sequence[str] = ("torch",),
    folder: Path = RESULTS,
) -> Path:
    """Append what was measured and show it with all that was measured before.

    Args:
        name: Of the benchmark and of its files.
        figures: One row of the table, or several; names with their units, and numbers or words.
        packages: Whose versions to note.
        folder: Of the files.

    Returns:
        The path of the table.
    """
    rows = [figures] if isinstance(figures, dict) else figures
    origin = provenance(packages)
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / f"{name}.jsonl"
    with open(lines, "a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(origin | row) + "\n")
    everything = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    path = folder / f"{name}.md"
    path.write_text(f"# {name}\n\n{table(everything)}", encoding="utf-8")
    return path


def provenance(packages: Sequence[str] = ("torch",)) -> dict[str, str]:
    """Return what figures taken now belong to: date (UTC), commit, machine and versions."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
    }


def commit() -> str:
    """Return the commit of the working tree, with ``-dirty`` if it was changed since."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def machine() -> str:
    """Return the processor with the number of usable cores, and the GPUs."""
    lines = Path("/proc/cpuinfo")
    names = lines.read_text().splitlines() if lines.exists() else []
    models = [line.partition(":")[2].strip() for line in names if line.startswith("model name")]
    text = f"{len(os.sched_getaffinity(0))} cores of {models[0] if models else platform.machine()}"
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{text}, {len(gpus)} {gpus[0]}" if gpus else text


def table(rows: Sequence[Figures]) -> str:
    """Return rows as a Markdown table; a column for every name in any of them.

    Args:
        rows: Numbers are shown with four digits.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)]
    lines += [[_text(row.get(name, "")) for name in names] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
