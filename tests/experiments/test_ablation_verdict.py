"""Verdicts: the paired interval against textbook values, and what is decided from it."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smol.experiments.ablation.arms import BASELINE, Arm
from smol.experiments.ablation.results import Measured, Results, final_value
from smol.experiments.ablation.runs import Run
from smol.experiments.ablation.study import Study
from smol.experiments.ablation.verdict import judge, paired, t_quantile

LOSS, OTHER = "held_out/bits_per_byte", "train/loss"
DECODER = {
    "vocab_size": 8,
    "hidden_size": 8,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 2,
    "intermediate_size": 8,
}


def test_quantiles_are_those_of_the_tables() -> None:
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 9: 2.26216, 30: 2.04227, 120: 1.97993}
    for degrees, quantile in table.items():
        assert t_quantile(degrees) == pytest.approx(quantile, rel=1e-4)


def test_student_s_own_data() -> None:
    """Hours of sleep gained by ten patients with two drugs (Student 1908)."""
    dextro = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    laevo = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = paired(dict(enumerate(dextro)), dict(enumerate(laevo)), 1)
    assert found.mean == pytest.approx(1.58)
    assert (found.low, found.high) == pytest.approx((0.7001, 2.4599), abs=1e-4)
    assert found.is_better
    assert not found.is_worse


VALUES = st.dictionaries(
    st.integers(0, 9), st.floats(0.5, 9, allow_nan=False), min_size=2, max_size=8
)


@given(VALUES, st.floats(-3, 3), st.floats(0.1, 3))
def test_a_shift_of_every_seed_is_certain_whatever_the_noise(values, shift, scale) -> None:
    found = paired(values, {seed: value + shift for seed, value in values.items()}, -1)
    assert found.mean == pytest.approx(shift, abs=1e-9)
    assert found.high - found.low == pytest.approx(0, abs=1e-6)
    scaled = paired({s: v * scale for s, v in values.items()}, values, -1)
    assert scaled.low <= scaled.mean <= scaled.high
    mirrored = paired(values, {s: v * scale for s, v in values.items()}, -1)
    assert mirrored.mean == pytest.approx(-scaled.mean)


def test_seeds_are_paired_and_one_alone_has_no_interval() -> None:
    found = paired({1: 1.0, 2: 5.0}, {2: 4.0, 3: 9.0}, -1)
    assert (found.mean, found.low, found.noise) == (-1.0, None, None)
    assert paired({1: 1.0}, {2: 1.0}, -1) is None


def test_a_metric_is_the_mean_of_the_last_twentieth() -> None:
    assert final_value([10, 96, 98, 100], [9.0, 1.0, 2.0, 3.0]) == 2.0
    assert final_value([50, 100], [9.0, 4.0]) == 4.0


def results(
    base, variant, benefit=None, tolerance=0.005, kv_heads=2, speed=1.0, failed=0
) -> Results:
    """Results of one variant; ``base`` and ``variant`` are values by metric, one for each seed."""
    seeds = tuple(range(len(next(iter(base.values())))))
    metrics = dict.fromkeys(base, "lower")
    changes = {"v": {"x": 1}}
    study = Study(
        Path("study.yaml"), (), changes, seeds, ("steps", 9), metrics, "", {}, benefit, tolerance
    )
    arms, runs = [], []
    for name, values, heads in ((BASELINE, base, 2), ("v", variant, kv_heads)):
        decoder = {**DECODER, "num_kv_heads": heads}
        model = {"init_args": {"decoder": decoder}}
        arms.append(Arm(name, {}, {"model": model, "trainer": {"max_steps": 9}}, {}, {}))
        for seed in seeds:
            ended = {metric: values[metric][seed] for metric in values}
            status = "failed" if name == "v" and seed < failed else "finished"
            rate = (speed if name == "v" else 1.0) * (100 + seed)
            run = Run(name, seed, Path(name), {})
            runs.append(Measured(run, status, "", ended, rate, 1.0, {}, {}))
    return Results(study, tuple(arms), tuple(runs))


BASE = [3.00, 3.10, 3.20]


@pytest.mark.parametrize(
    ("values", "options", "decision", "why"),
    [
        ([2.90, 3.01, 3.09], {}, "adopt", "better"),
        ([3.10, 3.21, 3.29], {}, "keep baseline", "worse"),
        ([3.01, 3.09, 3.20], {}, "keep baseline", "no difference seen"),
        ([3.001, 3.101, 3.199], {"benefit": "needs less memory"}, "adopt", "neutral .*less memory"),
        (
            [3.05, 3.05, 3.20],
            {"benefit": "any"},
            "undecided",
            "may be 4.* worse, 0.5% is tolerable",
        ),
        ([3.05, 3.05, 3.20], {"benefit": "any", "tolerance": 0.1}, "adopt", "neutral"),
        (
            [3.001, 3.101, 3.199],
            {"benefit": "fewer parameters", "kv_heads": 1},
            "adopt",
            "and fewer parameters",
        ),
        ([3.001, 3.101, 3.199], {"benefit": "fewer parameters"}, "keep baseline", "not fewer"),
        ([3.001, 3.101, 3.199], {"benefit": "faster", "speed": 1.2}, "adopt", "and faster"),
        ([3.001, 3.101, 3.199], {"benefit": "faster"}, "keep baseline", "not faster"),
        ([2.90, 3.01, 3.09], {"failed": 1}, "keep baseline", "1 of 3 runs failed"),
        (BASE, {"benefit": "any"}, "keep baseline", "nothing in this configuration reads"),
        ([3.10, 3.21, 3.29], {"benefit": "any"}, "keep baseline", "worse"),
    ],
)
def test_decisions(values, options, decision, why) -> None:
    verdict = judge(results({LOSS: BASE}, {LOSS: values}, **options), "v")
    assert verdict.decision == decision
    assert re.search(why, verdict.reason), verdict.reason


def test_a_gain_that_costs_another_metric_is_not_decided() -> None:
    better, worse = [2.90, 3.01, 3.09], [3.10, 3.21, 3.29]
    verdict = judge(results({LOSS: BASE, OTHER: BASE}, {LOSS: better, OTHER: worse}), "v")
    assert (verdict.decision, verdict.reason) == ("undecided", f"better, but {OTHER} is worse")
    verdict = judge(results({LOSS: BASE, OTHER: BASE}, {LOSS: BASE, OTHER: worse}), "v")
    assert verdict.decision == "keep baseline"


def test_one_seed_decides_nothing() -> None:
    verdict = judge(results({LOSS: [3.0]}, {LOSS: [1.0]}), "v")
    assert verdict.decision == "undecided"
    assert not math.isnan(verdict.differences[LOSS].mean)
