"""The mixture is exact, seekable and never drifts."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smol.data.mixture import Mixture
from smol.errors import UserError

weights = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=4),
    st.integers(1, 10**6).map(lambda n: n / 10**5),
    min_size=1,
    max_size=60,
)
SMOLLM3_LIKE = {f"source_{i}": w for i, w in enumerate([0.37, 0.333, 0.02, *[0.00325] * 54])}


@given(weights, st.integers(0, 10**10))
def test_counts_stay_within_two_samples_of_the_weights(w, k):
    mixture = Mixture(w)
    counts = mixture.counts(k)
    assert sum(counts.values()) == k
    for name, n in counts.items():
        assert abs(n - k * mixture.shares[name]) < 2


@pytest.mark.parametrize(
    "w",
    [
        SMOLLM3_LIKE,
        {f"s{i:02d}": 2.0**-i for i in range(40)},  # the deepest tree: each node loses a half
        {f"s{i:02d}": w for i, w in enumerate([1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144])},
    ],
)
def test_deviation_bound_holds_at_every_point_of_long_prefix(w):
    mixture = Mixture(w)
    n = 20_000
    source, _ = mixture.choose(0, n)
    for i, name in enumerate(mixture.names):
        realised = np.cumsum(source == i)
        expected = np.arange(1, n + 1) * float(mixture.shares[name])
        assert np.abs(realised - expected).max() < 2


@given(weights, st.integers(0, 10**10), st.integers(0, 200))
def test_choose_agrees_with_counts(w, start, length):
    mixture = Mixture(w)
    source, local = mixture.choose(start, start + length)
    before, after = mixture.counts(start), mixture.counts(start + length)
    for i, name in enumerate(mixture.names):
        assert list(local[source == i]) == list(range(before[name], after[name]))


@given(weights, st.integers(0, 10**10), st.lists(st.integers(0, 50), max_size=5))
def test_any_cut_of_a_range_gives_the_same_samples(w, start, cuts):
    mixture = Mixture(w)
    edges = sorted({0, 50, *cuts})
    whole = mixture.choose(start, start + 50)
    parts = [mixture.choose(start + a, start + b) for a, b in pairwise(edges)]
    for i in range(2):
        assert list(whole[i]) == [x for part in parts for x in part[i]]


def test_choose_matches_the_definition_one_sample_at_a_time():
    mixture = Mixture({"a": 0.5, "b": 0.3, "c": 0.2})
    for k in range(300):
        source, local = mixture.choose(k, k + 1)
        gained = {n: mixture.counts(k + 1)[n] - mixture.counts(k)[n] for n in mixture.names}
        name = mixture.names[source[0]]
        assert gained == {n: int(n == name) for n in mixture.names}
        assert local[0] == mixture.counts(k)[name]


def test_weights_beyond_machine_integers_stay_exact():
    w = {"a": Fraction(1, 3), "b": Fraction(10**30 + 7, 10**30 + 9), "c": Fraction(1, 7)}
    mixture = Mixture(w)
    k = 10**10
    assert sum(mixture.counts(k).values()) == k
    source, _ = mixture.choose(k, k + 100)
    after, before = mixture.counts(k + 100), mixture.counts(k)
    for i, name in enumerate(mixture.names):
        assert (source == i).sum() == after[name] - before[name]


def test_order_of_the_mapping_does_not_matter_and_zero_weight_is_never_chosen():
    a = Mixture({"x": 1, "y": 3, "z": 0})
    b = Mixture({"z": 0, "y": 3, "x": 1})
    assert (a.choose(0, 100)[0] == b.choose(0, 100)[0]).all()
    assert a.counts(10**6)["z"] == 0


@pytest.mark.parametrize("w", [{}, {"a": 0}, {"a": -1, "b": 2}, {"a": float("nan")}])
def test_impossible_weights_are_refused(w):
    with pytest.raises(UserError):
        Mixture(w)
