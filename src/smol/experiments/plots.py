"""Pictures of a run."""

import csv
from pathlib import Path


def read_metrics(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Columns of a ``metrics.csv``: name to (steps, values), without the empty cells."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name != "step" and value:
                    steps, values = series.setdefault(name, ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(value))
    return series


def plot_training(metrics: Path, picture: Path, title: str) -> None:
    """Draw loss and learning rate over steps, and held-out bits per byte per source.

    Args:
        metrics: The run's ``metrics.csv``.
        picture: Where the PNG goes.
        title: Name of the run.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series = read_metrics(metrics)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    figure.suptitle(title)
    if "train/loss" in series:
        left.plot(*series["train/loss"], color="tab:blue", linewidth=1.2)
    left.set(xlabel="optimiser step", ylabel="training loss, nats per token")
    left.grid(alpha=0.3)
    if "train/learning_rate" in series:
        rate = left.twinx()
        rate.plot(*series["train/learning_rate"], color="tab:gray", linewidth=1, linestyle="--")
        rate.set_ylabel("learning rate (dashed)", color="tab:gray")
        rate.set_ylim(bottom=0)
    prefix = "held_out/bits_per_byte/"
    for name in sorted(name for name in series if name.startswith(prefix)):
        steps, values = series[name]
        label = f"{name.removeprefix(prefix)}: {values[-1]:.3f}"
        right.plot(steps, values, marker="o", markersize=3, linewidth=1.2, label=label)
    right.set(xlabel="optimiser step", ylabel="held-out bits per byte")
    right.grid(alpha=0.3)
    if right.lines:
        right.legend(title="source: last value")
    figure.savefig(picture, dpi=120)
    plt.close(figure)
