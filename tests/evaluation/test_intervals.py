"""Intervals against their definition and against what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smol.evaluation.intervals import Estimate, Z, proportion, ratio


@given(hits=st.integers(0, 300), misses=st.integers(0, 300))
def test_wilson_solves_its_equation(hits, misses):
    n = hits + misses
    if not n:
        return
    found = proportion([True] * hits + [False] * misses)
    share = hits / n
    # Both ends p satisfy (share - p)^2 = z^2 p (1 - p) / n: roots of a p^2 + b p + c.
    a, b, c = 1 + Z**2 / n, -2 * share - Z**2 / n, share**2
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    low, high = (-b - root) / (2 * a), (-b + root) / (2 * a)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert (found.value, found.items) == (share, n)


def test_a_published_interval():
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662 by Wilson's method.
    found = proportion([1] * 81 + [0] * 182)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_centred_accuracy_is_zero_by_chance_and_one_at_best():
    assert proportion([1, 0, 0, 0]).scaled(0.25, 4 / 3).value == 0
    assert proportion([1, 1]).scaled(0.25, 4 / 3).value == 1
    assert Estimate(0.5, 0.4, 0.6, 9).scaled(0.25, 4 / 3).low == pytest.approx(0.2)


def test_bootstrap_of_a_mean_is_as_wide_as_the_normal_interval():
    values = np.random.default_rng(3).normal(5, 2, 400)
    found = ratio(values)
    half = Z * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_a_ratio_is_of_sums_and_draws_pairs():
    bits, sizes = [10.0, 200.0, 30.0], [5, 100, 15]  # two bits per byte in every item
    found = ratio(bits, sizes)
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))
    assert ratio([1.0, 9.0], [1, 3]).value == 2.5


def test_one_item_has_no_interval():
    assert ratio([6.0], [3]) == Estimate(2.0, None, None, 1)
    assert ratio([6.0], [3]).scaled(1, 2) == Estimate(2.0, None, None, 1)
    assert proportion([1]).low < 0.25  # but one hit does say something
