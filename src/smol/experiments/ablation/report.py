"""The report of a study: verdicts, differences and every run."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from smol.experiments.ablation.arms import BASELINE, Arm
from smol.experiments.ablation.mixtures import repetition
from smol.experiments.ablation.results import Results
from smol.experiments.ablation.runs import FINISHED
from smol.experiments.ablation.verdict import Difference, Verdict
from smol.experiments.document import Block, Picture, Table, write_document

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS = "train/loss"
SMALL = 10**9  # parameters, below which a verdict is told to be of a small model


def write_report(results: Results, verdicts: Sequence[Verdict], folder: Path) -> tuple[Path, Path]:
    """Write ``report.md`` and ``report.html``.

    Args:
        results: Of the study.
        verdicts: On its variants.
        folder: Where the files go.

    Returns:
        Both files.
    """
    study = results.study
    blocks: list[Block] = [study.question] if study.question else []
    blocks += ["## Verdicts", verdict_table(results, verdicts)]
    blocks += [f"- **{v.variant}: {v.decision}.** {_sentence(v)}" for v in verdicts]
    blocks += [f"- Warning: {line}." for line in results.warnings]
    if any(verdict.differences for verdict in verdicts):
        blocks.append(
            Picture(
                "differences",
                lambda: _draw_differences(results, verdicts),
                "Difference to the baseline: mean over the seeds and 95 % interval of the paired "
                "differences, which are the small points. The grey band is one standard deviation "
                "of the baseline over the seeds to either side.",
            )
        )
    if any(LOSS in run.series for run in results.runs):
        caption = (
            "Training loss: the mean over the seeds, smoothed, and the range that they span; "
            "below, the difference of the means."
        )
        blocks.append(Picture("loss", lambda: _draw_loss(results), caption))
    blocks += ["## Metrics", *(_metric_table(results, name) for name in study.metrics)]
    blocks += ["## What is compared", _arm_table(results)]
    if sources := _source_table(results):
        blocks += ["## What is read", sources]
    blocks += ["## Runs", _run_table(results), "## What this can and cannot show", _limits(results)]
    return write_document(folder, f"Ablation: {study.name}", blocks)


def verdict_table(results: Results, verdicts: Sequence[Verdict]) -> Table:
    """One line for each variant: the metric that decides, its noise, cost, and the verdict."""
    metric, better = next(iter(results.study.metrics.items()))
    rows = []
    for arm in results.variants:
        verdict = next(v for v in verdicts if v.variant == arm.name)
        difference = verdict.differences.get(metric)
        rows.append(
            [
                arm.name,
                f"{difference.mean:+.4f}" if difference else "-",
                interval(difference),
                "-"
                if difference is None or difference.noise is None
                else f"{difference.noise:.4f}",
                _speed(results, arm.name),
                _parameters(results, arm),
                _minutes(results, arm.name),
                verdict.decision,
                verdict.reason,
            ]
        )
    header = ("variant", "difference", "95 % interval", "noise", "tokens/s", "parameters")
    header += ("minutes", "verdict", "why")
    caption = (
        f"Of {metric} ({better} is better), variant minus baseline, paired by seed; noise is the "
        "standard deviation of the baseline over the seeds. Speed and parameters against the "
        "baseline; minutes are those of all runs of the variant."
    )
    return Table(header, rows, caption)


def interval(difference: Difference | None) -> str:
    """An interval in words, or a dash."""
    if difference is None or difference.low is None:
        return "-"
    return f"{difference.low:+.4f} to {difference.high:+.4f}"


def _sentence(verdict: Verdict) -> str:
    text = verdict.reason[0].upper() + verdict.reason[1:]
    return f"{text}."


def _speed(results: Results, arm: str) -> str:
    own, base = results.speeds(arm), results.speeds(BASELINE)
    if not own or not base:
        return "-"
    return f"{fmean(own.values()):,.0f} ({fmean(own.values()) / fmean(base.values()) - 1:+.0%})"


def _parameters(results: Results, arm: Arm) -> str:
    if arm.parameters is None:
        return "-"
    return f"{arm.parameters:,} ({arm.parameters / results.arms[0].parameters - 1:+.1%})"


def _minutes(results: Results, arm: str) -> str:
    return f"{sum(run.seconds or 0 for run in results.of(arm)) / 60:.1f}"


def _metric_table(results: Results, metric: str) -> Table:
    seeds = results.study.seeds
    rows = []
    for arm in results.arms:
        values = results.values(arm.name, metric)
        numbers = list(values.values())
        rows.append(
            [
                arm.name,
                f"{fmean(numbers):.4f}" if numbers else "-",
                f"{stdev(numbers):.4f}" if len(numbers) > 1 else "-",
                *(f"{values[seed]:.4f}" if seed in values else "-" for seed in seeds),
            ]
        )
    header = (metric, "mean", "deviation", *(f"seed {seed}" for seed in seeds))
    return Table(header, rows, f"{results.study.metrics[metric]} is better.")


def _arm_table(results: Results) -> Table:
    rows = []
    for arm in results.arms:
        told = "; ".join(f"`{k}`: {_value(a)} → {_value(b)}" for k, (a, b) in arm.changes.items())
        tokens = "-" if arm.tokens is None else f"{arm.tokens:,}"
        rows.append([arm.name, told or "-", f"{arm.steps:,}", tokens])
    return Table(("", "what it changes", "steps", "tokens"), rows)


def _value(value: Any) -> str:
    return "nothing" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _source_table(results: Results) -> Table | None:
    read = {arm.name: repetition(arm.resolved) for arm in results.arms}
    if results.study.start is None or not any(read.values()):
        return None
    rows = [
        [name, source, f"{tokens:,}", f"{epochs:.2f}"]
        for name, sources in read.items()
        for source, (tokens, epochs) in sources.items()
    ]
    return Table(("", "source", "tokens", "epochs"), rows)


def _run_table(results: Results) -> Table:
    metric = next(iter(results.study.metrics))
    rows = []
    for run in results.runs:
        told = f"{run.status}: {run.message}" if run.message else run.status
        rows.append(
            [
                run.run.arm,
                str(run.run.seed),
                told,
                f"{run.values[metric]:.4f}" if run.values else "-",
                f"{run.speed:,.0f}" if run.speed else "-",
                f"{run.seconds:,.0f}" if run.seconds else "-",
                f"`{run.run.folder.name}`",
            ]
        )
    header = ("", "seed", "status", metric, "tokens/s", "seconds", "folder")
    folder = results.runs[0].run.folder.parent
    return Table(header, rows, f"Folders are in {folder.parent.name}/{folder.name}.")


def _limits(results: Results) -> str:
    baseline, runs = results.arms[0], results.runs
    seconds = sum(run.seconds or 0 for run in runs)
    made = next((run.made_by for run in runs if run.made_by), {})
    size = f"{baseline.parameters:,} parameters and " if baseline.parameters else ""
    tokens = f"{baseline.tokens:,} tokens" if baseline.tokens else f"{baseline.steps:,} steps"
    lines = [
        f"- {size}{tokens} a run, {len(results.study.seeds)} seeds, {len(runs)} runs, "
        f"{seconds / 60:.1f} minutes of computing in all.",
        "- The interval is about other seeds of the same set-up: initialisation and order of the "
        "data. It says nothing of other data, sizes or lengths of training.",
    ]
    if baseline.parameters and baseline.parameters < SMALL:
        lines.append(
            "- At this size a clear loss is a reason to drop a change and a clear gain one to test "
            "it larger; no difference here is no proof that there is none at scale."
        )
    if len(results.variants) > 1:
        lines.append(
            f"- {len(results.variants)} variants share a baseline: of 20 comparisons without any "
            "difference, one is expected to show one."
        )
    if made:
        lines.append(
            f"- Made with torch {made.get('torch')} on {made.get('processor')}, threads of each "
            f"run {made.get('threads') or 'all'}, training code `{made.get('code')}`."
        )
    return "\n".join(lines)


# -- pictures --------------------------------------------------------------------------------------


def _draw_differences(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    from matplotlib.figure import Figure

    metrics = list(results.study.metrics)
    names = [verdict.variant for verdict in verdicts]
    size = (3.2 + 3.4 * len(metrics), 1.6 + 0.5 * len(names))
    figure = Figure(figsize=size, constrained_layout=True)
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        known = [v.differences[metric] for v in verdicts if metric in v.differences]
        if noise := next((d.noise for d in known if d.noise), None):
            axes.axvspan(-noise, noise, color="0.9", zorder=0)
        axes.axvline(0, color="0.4", linewidth=0.8)
        for row, verdict in enumerate(verdicts):
            if metric in verdict.differences:
                _draw_interval(axes, row, verdict.differences[metric])
        axes.set(xlabel=f"{metric}\n{results.study.metrics[metric]} is better")
        axes.grid(axis="x", alpha=0.3)
        axes.locator_params(axis="x", nbins=5)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def _draw_interval(axes: Any, row: int, difference: Difference) -> None:
    color = "tab:green" if difference.is_better else "tab:red" if difference.is_worse else "0.35"
    values = list(difference.by_seed.values())
    axes.plot(values, [row + 0.18] * len(values), "o", markersize=3, color=color, alpha=0.5)
    if difference.low is not None:
        axes.plot([difference.low, difference.high], [row, row], color=color, linewidth=2)
    axes.plot([difference.mean], [row], "D", color=color, markersize=6)


def _draw_loss(results: Results) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), constrained_layout=True)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(5, 3))
    base = None
    for index, arm in enumerate(results.arms):
        curves = [
            run.series[LOSS]
            for run in results.of(arm.name)
            if run.status == FINISHED and LOSS in run.series
        ]
        if not curves:
            continue
        color = "0.2" if arm.name == BASELINE else f"C{index - 1}"
        steps, rows = _aligned(curves)
        columns = list(zip(*rows, strict=True))
        means = dict(zip(steps, map(fmean, columns), strict=True))
        axes.plot(*zip(*means.items(), strict=True), color=color, label=arm.name, linewidth=1.6)
        low, high = map(min, columns), map(max, columns)
        axes.fill_between(steps, list(low), list(high), color=color, alpha=0.15, linewidth=0)
        base = means if arm.name == BASELINE else base
        shared = [step for step in steps if step in (base or {})]
        below.plot(shared, [means[step] - base[step] for step in shared], color=color)
    axes.set(ylabel="training loss, nats per token")
    below.set(xlabel="optimiser step", ylabel="minus baseline")
    for panel in (axes, below):
        panel.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def _aligned(
    curves: Sequence[tuple[list[int], list[float]]],
) -> tuple[list[int], list[list[float]]]:
    """The steps that all curves have, and their smoothed values there."""
    shared = sorted(set.intersection(*(set(steps) for steps, _ in curves)))
    smooth = [dict(zip(s, _smoothed(values), strict=True)) for s, values in curves]
    return shared, [[values[step] for step in shared] for values in smooth]


def _smoothed(values: Sequence[float], share: float = 0.05) -> list[float]:
    """The mean of the last twentieth of a curve, at each of its points."""
    window = max(1, round(len(values) * share))
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    starts = [max(0, end - window) for end in range(1, len(sums))]
    return [(sums[i + 1] - sums[start]) / (i + 1 - start) for i, start in enumerate(starts)]
