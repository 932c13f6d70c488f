"""Pictures of a run, as files."""

import csv
import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW_TOKENS = 100  # the mean of fewer is drawn faint
MOST_SOURCES = 10  # more lines than that cannot be told apart


def read_metrics(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Columns of a ``metrics.csv``: name to (steps, values), without the empty cells.

    The file may be one that a run still writes to: what follows the last end of a line is left out.
    """
    series: dict[str, tuple[list[int], list[float]]] = {}
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    for row in csv.DictReader(whole.splitlines()):
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
    from matplotlib.figure import Figure

    series = read_metrics(metrics)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
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


def plot_loss_by_position(
    before: dict[str, Any] | None, after: dict[str, Any], picture: Path, title: str
) -> None:
    """Write :func:`loss_by_position` into a file.

    Args:
        before: As there.
        after: As there.
        picture: Where the PNG goes.
        title: Name of the run.
    """
    figure = loss_by_position(before, after)
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)


def loss_by_position(before: dict[str, Any] | None, after: dict[str, Any]) -> "Figure":
    """Draw each source's loss over the position in the document, and how many tokens that is of.

    The bins are powers of two and drawn equally wide, so the axis is a logarithmic one. What rests
    on few tokens is faint, its points hollow.

    Args:
        before: An earlier measurement, drawn dashed; ``None`` if there is none.
        after: ``step`` and what :class:`~smol.evaluation.loss_by_position.LossByPosition` computes.
    """
    from matplotlib.figure import Figure

    measured = {"-": after} if before is None else {"--": before, "-": after}
    names = sorted(after["sources"])[:MOST_SOURCES]
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    figure = Figure(figsize=(8.5, 6.4), layout="constrained")
    losses, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for style, measurement in measured.items():
        losses.plot([], [], style, color="0.3", label=f"step {measurement['step']:,}")
        for name in colors.keys() & measurement["sources"].keys():
            _draw_losses(losses, measurement["sources"][name]["by_position"], style, colors[name])
    for i, name in enumerate(names):
        _draw_counts(counts, after["sources"][name]["by_position"], colors[name], i, len(names))
        losses.plot([], [], "s", color=colors[name], label=_label(name, measured.values()))
    hollow = {"marker": "o", "markerfacecolor": "none", "linestyle": "none", "color": "0.3"}
    losses.plot([], [], label=f"fewer than {FEW_TOKENS} tokens", alpha=0.5, **hollow)
    if more := len(after["sources"]) - len(names):
        losses.plot([], [], linestyle="none", label=f"and {more} more, in figures")
    losses.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    losses.set_ylabel("held-out loss, nats per token")
    counts.axhline(FEW_TOKENS, color="0.3", linewidth=0.8, linestyle=":")
    counts.set(
        yscale="log", ylabel="tokens", xlabel="position in the document, as seen in its block"
    )
    counts.set_ylim(bottom=0.5)
    edges = max((m["edges"] for m in measured.values()), key=len)
    ticks = [f"{a:,}" if b - a == 1 else f"{a:,}-{b - 1:,}" for a, b in pairwise(edges)]
    counts.set_xticks(range(len(ticks)), ticks, rotation=40, ha="right", rotation_mode="anchor")
    for axes in (losses, counts):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure


def _draw_losses(axes: Any, by_position: dict[str, list], style: str, color: Any) -> None:
    loss = [math.nan if x is None else x for x in by_position["loss"]]
    few = [tokens < FEW_TOKENS for tokens in by_position["tokens"]]
    axes.plot(loss, style, color=color, alpha=0.3, linewidth=1.4)
    sure = [math.nan if f else x for f, x in zip(few, loss, strict=True)]
    axes.plot(sure, style, color=color, linewidth=1.4, marker="o", markersize=4)
    unsure = [x if f else math.nan for f, x in zip(few, loss, strict=True)]
    axes.plot(unsure, "o", color=color, alpha=0.5, markersize=4, markerfacecolor="none")


def _draw_counts(axes: Any, by_position: dict, color: Any, place: int, places: int) -> None:
    width = 0.8 / places
    for k, tokens in enumerate(by_position["tokens"]):
        center = k + (place - (places - 1) / 2) * width
        axes.bar(center, tokens, width, color=color, alpha=1.0 if tokens >= FEW_TOKENS else 0.4)


def _label(name: str, measured: Iterable[dict[str, Any]]) -> str:
    losses = [m["sources"][name]["loss"] for m in measured if name in m["sources"]]
    return f"{name}: " + " → ".join(f"{loss:.3f}" for loss in losses)
