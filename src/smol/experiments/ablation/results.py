"""What the runs of a study have measured."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from smol.errors import UserError, nearest
from smol.experiments.ablation.arms import BASELINE, Arm
from smol.experiments.ablation.runs import FAILED, FINISHED, Run
from smol.experiments.ablation.study import Study
from smol.experiments.plots import read_metrics

TAIL = 0.05  # share of the steps, at the end, whose mean a metric is
SPEED = "throughput/tokens_per_second"

Series = dict[str, tuple[list[int], list[float]]]


@dataclass(frozen=True)
class Measured:
    """One run and what came of it.

    Attributes:
        run: The run.
        status: ``finished``, ``failed``, ``stopped`` or ``not begun``.
        message: Why it failed.
        values: The study's metrics by name; empty unless finished.
        speed: Tokens per second, the median over the run; None where it is not known.
        seconds: Wall time of all its starts; None before the first has ended.
        made_by: Versions and processor.
        series: All that it has logged.
    """

    run: Run
    status: str
    message: str
    values: Mapping[str, float]
    speed: float | None
    seconds: float | None
    made_by: Mapping[str, Any]
    series: Series


@dataclass(frozen=True)
class Results:
    """A study with its arms, the baseline first, and all of their runs."""

    study: Study
    arms: tuple[Arm, ...]
    runs: tuple[Measured, ...]

    def of(self, arm: str) -> list[Measured]:
        """The runs of an arm, in the order of the seeds."""
        return [run for run in self.runs if run.run.arm == arm]

    def values(self, arm: str, metric: str) -> dict[int, float]:
        """A metric by seed, of the runs of an arm that finished."""
        return {r.run.seed: r.values[metric] for r in self.of(arm) if r.status == FINISHED}

    def speeds(self, arm: str) -> dict[int, float]:
        """Tokens per second by seed."""
        known = [r for r in self.of(arm) if r.status == FINISHED and r.speed is not None]
        return {r.run.seed: r.speed for r in known}

    @property
    def variants(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in self.arms if arm.name != BASELINE)

    @property
    def warnings(self) -> list[str]:
        """What should be known before the figures are believed."""
        said = []
        for key, label in {"code": "the code", "torch": "torch", "processor": "processor"}.items():
            found = {run.made_by[key] for run in self.runs if key in run.made_by}
            if len(found) > 1:
                names = ", ".join(sorted(map(str, found)))
                said.append(
                    f"the runs were made by {len(found)} versions of {label} ({names}); --retry "
                    "all makes them anew"
                )
        if len({r.made_by.get("threads") for r in self.runs if r.made_by}) > 1:
            said.append("the runs had different numbers of threads; their speeds do not compare")
        return said


def load_results(study: Study, arms: Iterable[Arm], runs: Iterable[Run]) -> Results:
    """Read what runs have logged.

    Raises:
        UserError: A metric of the study is in no finished run.
    """
    return Results(study, tuple(arms), tuple(_measured(study, run) for run in runs))


def final_value(steps: list[int], values: list[float]) -> float:
    """The mean of what was logged in the last twentieth of a run."""
    tail = [v for s, v in zip(steps, values, strict=True) if s > (1 - TAIL) * steps[-1]]
    return fmean(tail)


def _measured(study: Study, run: Run) -> Measured:
    record, status = run.record, run.status
    message, file = record.get("message", ""), run.folder / "metrics.csv"
    series = read_metrics(file) if file.is_file() else {}
    values = {}
    if status == FINISHED:
        values = {name: final_value(*_series(name, series, run)) for name in study.metrics}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            status, message, values = FAILED, f"diverged: {bad[0]} is not finite", {}
    return Measured(
        run,
        status,
        message,
        values,
        median(series[SPEED][1]) if SPEED in series else None,
        record.get("seconds"),
        record.get("made_by", {}),
        series,
    )


def _series(name: str, series: Series, run: Run) -> tuple[list[int], list[float]]:
    if name not in series:
        raise UserError(
            f"unknown metric '{name}': the run {run.folder} logged {', '.join(sorted(series))}."
            f"{nearest(name, series)} The runs are kept; correct the name and go on"
        )
    return series[name]
