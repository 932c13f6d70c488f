"""Whether a variant is adopted: differences paired by seed, with the interval they leave open."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev
from typing import Literal

import numpy as np

from smol.experiments.ablation.arms import BASELINE
from smol.experiments.ablation.results import Results
from smol.experiments.ablation.runs import FAILED, FINISHED

ADOPT, KEEP, UNDECIDED = "adopt", "keep baseline", "undecided"
Decision = Literal["adopt", "keep baseline", "undecided"]
FEWER, FASTER = "fewer parameters", "faster"  # benefits that are measured


@dataclass(frozen=True)
class Difference:
    """Variant minus baseline, over seeds.

    Attributes:
        mean: Mean of the differences of runs with the same seed.
        low: Lower end of its 95 % interval; None with fewer than two seeds.
        high: Upper end.
        by_seed: The differences.
        baseline: The baseline's mean over the same seeds.
        noise: Standard deviation of the baseline over them; None with fewer than two.
        better: 1 where higher values are better, else -1.
    """

    mean: float
    low: float | None
    high: float | None
    by_seed: Mapping[int, float]
    baseline: float
    noise: float | None
    better: int

    @property
    def is_better(self) -> bool:
        return self.low is not None and min(self.better * self.low, self.better * self.high) > 0

    @property
    def is_worse(self) -> bool:
        return self.low is not None and max(self.better * self.low, self.better * self.high) < 0

    @property
    def at_worst(self) -> float:
        """How much worse it may be, as a share of the baseline's value; negative if better."""
        worst = max(-self.better * self.low, -self.better * self.high)
        return worst / abs(self.baseline) if self.baseline else math.inf


@dataclass(frozen=True)
class Verdict:
    """What is decided about a variant, and why."""

    variant: str
    decision: Decision
    reason: str
    differences: Mapping[str, Difference]


@cache
def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t distribution.

    With ``t = sqrt(n)·tan(a)`` the density is proportional to ``cos(a)**(n - 1)``, which is summed
    up over half of the circle.

    Args:
        degrees: Degrees of freedom, at least 1.
    """
    angle = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(angle) ** (degrees - 1)
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(math.sqrt(degrees) * np.tan(np.interp(0.95 * mass[-1], mass, angle)))


def paired(
    baseline: Mapping[int, float], variant: Mapping[int, float], better: int
) -> Difference | None:
    """Compare values by seed; None where no seed is in both.

    The interval is that of the paired t test: mean ± t·s/√n of the differences, n - 1 degrees of
    freedom (Student 1908).
    """
    seeds = sorted(baseline.keys() & variant.keys())
    if not seeds:
        return None
    differences = {seed: variant[seed] - baseline[seed] for seed in seeds}
    mean, values = fmean(differences.values()), [baseline[seed] for seed in seeds]
    if len(seeds) < 2:
        return Difference(mean, None, None, differences, fmean(values), None, better)
    half = t_quantile(len(seeds) - 1) * stdev(differences.values()) / math.sqrt(len(seeds))
    noise = stdev(values)
    return Difference(mean, mean - half, mean + half, differences, fmean(values), noise, better)


def differences(results: Results, variant: str) -> dict[str, Difference]:
    """A variant's differences to the baseline, by metric."""
    found = {}
    for metric, better in results.study.metrics.items():
        pair = (results.values(BASELINE, metric), results.values(variant, metric))
        if difference := paired(*pair, 1 if better == "higher" else -1):
            found[metric] = difference
    return found


def judge(results: Results, variant: str) -> Verdict:
    """Decide about a variant.

    It is adopted if the first metric is better by more than the seeds' noise and no other one is
    worse; or if none is worse, by how much it may be worse is tolerable, and it has the benefit
    that the study names. It is not adopted if one of its runs has failed.
    """
    found = differences(results, variant)
    decision, reason = _decide(results, variant, found)
    return Verdict(variant, decision, reason, found)


def _decide(
    results: Results, variant: str, found: Mapping[str, Difference]
) -> tuple[Decision, str]:
    runs, study = results.of(variant), results.study
    failed = [run for run in runs if run.status == FAILED]
    if failed:
        return KEEP, f"{len(failed)} of {len(runs)} runs failed"
    if broken := [run for run in results.of(BASELINE) if run.status == FAILED]:
        return UNDECIDED, f"{len(broken)} runs of the baseline failed"
    missing = [r for arm in (variant, BASELINE) for r in results.of(arm) if r.status != FINISHED]
    if missing:
        return UNDECIDED, f"{len(missing)} runs have not finished"
    first = found[next(iter(study.metrics))]
    if first.low is None:
        return UNDECIDED, "one seed shows no noise to compare with; give more"
    if not any(any(d.by_seed.values()) for d in found.values()):
        return KEEP, "the same to the last digit: nothing in this configuration reads the change"
    worse = [name for name, difference in found.items() if difference.is_worse]
    if first.is_better:
        if worse:
            return UNDECIDED, f"better, but {worse[0]} is worse"
        return ADOPT, "better"
    if worse:
        return KEEP, "worse" if first.is_worse else f"no difference, and {worse[0]} is worse"
    if study.benefit is None:
        return KEEP, "no difference seen"
    if not _has_benefit(results, variant):
        return KEEP, f"no difference seen, and not {study.benefit}"
    at_worst = f"it may be {first.at_worst:.1%} worse"
    if first.at_worst > study.tolerance:
        return UNDECIDED, f"{at_worst}, {study.tolerance:.1%} is tolerable; more seeds tell"
    return ADOPT, f"neutral ({at_worst} at most), and {study.benefit}"


def _has_benefit(results: Results, variant: str) -> bool:
    """Whether a benefit that can be measured is there; others are taken at their word."""
    benefit = results.study.benefit
    if benefit == FEWER:
        parameters = {arm.name: arm.parameters or 0 for arm in results.arms}
        return parameters[variant] < parameters[BASELINE]
    if benefit == FASTER:
        speed = paired(results.speeds(BASELINE), results.speeds(variant), 1)
        return speed is not None and speed.is_better
    return True
