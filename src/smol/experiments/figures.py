"""Figures of runs: curves side by side, one legend beside them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from smol.experiments.records import Metrics, Series

STEPS, TOKENS = "optimiser step", "tokens trained on"
LOSS = "train/loss"
FEW_POINTS = 20  # as many are not smoothed
SPAN = 0.03  # of the points that an average reaches back over
MOST_LINES = 10  # colours that can be told apart
MARKS = {  # events beside the loss: marker and colour
    "saved": ("|", "0.5"),
    "restart": (">", "tab:blue"),
    "dropped_step": ("x", "tab:orange"),
    "rollback": ("v", "tab:red"),
    "fault": ("*", "tab:purple"),
}
OTHER_MARK = ("d", "tab:brown")


@dataclass(frozen=True)
class Line:
    """Values over steps or tokens; lines of one label have one colour."""

    label: str
    series: "Series"


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        label: Of the y axis, with the unit.
        lines: What is drawn.
        scale: Of the y axis: ``linear``, ``log``, ``zero`` (linear from zero), or ``percent`` of
            a fraction.
        smooth: Whether lines are smoothed, with the raw values faint behind.
    """

    label: str
    lines: Sequence[Line] = field(default_factory=list)
    scale: str = "linear"
    smooth: bool = False


def smoothed(values: Sequence[float]) -> list[float]:
    """An exponential moving average over ``SPAN`` of the points, without bias at its beginning.

    Values that are not finite are passed over.
    """
    keep = 1 - 1 / max(1.0, SPAN * len(values))
    total = weight = 0.0
    means = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight if weight else math.nan)
    return means


def over_tokens(metrics: "Metrics") -> "Metrics":
    """Metrics over the tokens trained on instead of the steps.

    Args:
        metrics: With ``train/tokens`` among them.
    """
    import numpy as np

    known = metrics["train/tokens"]
    return {
        name: (np.interp(steps, *known).tolist(), values)
        for name, (steps, values) in metrics.items()
    }


def panel(runs: Mapping[str, "Metrics"], metric: str, label: str, **look: Any) -> list[Panel]:
    """A panel with a line for each run that has the metric; none if no run has."""
    lines = [Line(name, run[metric]) for name, run in runs.items() if metric in run]
    return [Panel(label, lines, **look)] if lines else []


def panels_by_source(runs: Mapping[str, "Metrics"], prefix: str, label: str) -> list[Panel]:
    """Of one run a panel with a line for each source, of several a panel for each source."""
    names = {name for run in runs.values() for name in run if name.startswith(prefix)}
    names = sorted(names)[:MOST_LINES]
    if len(runs) > 1:
        return [p for n in names for p in panel(runs, n, f"{n.removeprefix(prefix)}: {label}")]
    lines = [Line(n.removeprefix(prefix), run[n]) for run in runs.values() for n in names]
    return [Panel(label, lines)] if lines else []


def curves(panels: Sequence[Panel], x_label: str = STEPS) -> "Figure":
    """Draw panels, two in a row, with one legend if there is more than one label."""
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    labels = list(dict.fromkeys(line.label for p in panels for line in p.lines))
    width = 9.0 if columns == 2 else 7.0
    figure = Figure(figsize=(width, 2.6 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axes, content in zip(grid.flat, panels, strict=False):
        for line in content.lines:
            _draw(axes, line, f"C{labels.index(line.label) % MOST_LINES}", content.smooth)
        _dress(axes, content)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for place, axes in enumerate(grid.flat[: len(panels)]):
        if place + columns >= len(panels):  # nothing is below
            axes.set_xlabel(x_label)
            axes.tick_params(labelbottom=True)
    if len(labels) > 1:
        handles = [_handle(f"C{i % MOST_LINES}", label) for i, label in enumerate(labels)]
        figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def training_loss(
    runs: Mapping[str, "Metrics"],
    events: Sequence[Mapping[str, Any]] = (),
    stages: Mapping[str, int] | None = None,
    x_label: str = STEPS,
) -> "Figure":
    """Draw the training loss, raw and smoothed, with marks where something happened.

    Args:
        runs: Metrics by the name of the run.
        events: Rows with ``step`` and ``kind``; drawn along the lower edge.
        stages: The first step of each stage; drawn as lines with the name above.
        x_label: What the metrics are over.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    (content,) = panel(runs, LOSS, "training loss, nats per token", smooth=True)
    handles = []
    for i, line in enumerate(content.lines):
        _draw(axes, line, f"C{i % MOST_LINES}", smooth=True)
        handles.append(_handle(f"C{i % MOST_LINES}", line.label))
    _dress(axes, content)
    axes.set_xlabel(x_label)
    for name, step in (stages or {}).items():
        axes.axvline(step, color="0.4", linewidth=0.8, linestyle="--")
        axes.annotate(
            name, (step, 1), (2, 3), xycoords=axes.get_xaxis_transform(), fontsize=8,
            textcoords="offset points",
        )  # fmt: skip
    known = [*MARKS, *sorted({e["kind"] for e in events} - MARKS.keys())]
    kinds = [kind for kind in known if any(event["kind"] == kind for event in events)]
    for height, kind in enumerate(kinds):
        marker, color = MARKS.get(kind, OTHER_MARK)
        steps = [event["step"] for event in events if event["kind"] == kind]
        handles += axes.plot(
            steps, [0.03 + 0.04 * height] * len(steps), marker, color=color, markersize=6,
            transform=axes.get_xaxis_transform(), label=kind.replace("_", " "),
        )  # fmt: skip
    if kinds:  # the marks have their own strip below the curve
        low, high = axes.get_ylim()
        axes.set_ylim(low - (high - low) * 0.05 * len(kinds), high)
    if len(handles) > 1:
        figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def _draw(axes: Any, line: Line, color: str, smooth: bool) -> None:
    steps, values = line.series
    if smooth and len(values) > FEW_POINTS:
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
        values = smoothed(values)
    few = {"marker": "o", "markersize": 3} if len(values) <= FEW_POINTS else {}
    axes.plot(steps, values, color=color, linewidth=1.4, **few)


def _dress(axes: Any, content: Panel) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, PercentFormatter

    values = [y for line in content.lines for y in line.series[1] if math.isfinite(y)]
    axes.set_ylabel(content.label)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if content.scale == "log" and values and min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        narrow = max(values) < 10 * min(values)  # so that a decade has one label, or none
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5) if narrow else "auto"))
        axes.yaxis.set_minor_formatter("{x:g}" if narrow else NullFormatter())
    elif content.scale == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    elif values and max(map(abs, values)) >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if content.scale in ("zero", "percent"):
        axes.set_ylim(bottom=0)
    if max((line.series[0][-1] for line in content.lines), default=0) >= 10_000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _handle(color: str, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linewidth=2, label=label)
