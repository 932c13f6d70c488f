"""Packing: nothing lost, nothing cut, and as few rows as the rule of best fit makes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smol.data.packing import pack, pieces

SETS = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(0, capacity), max_size=80), st.just(capacity))
)


def best_fit_decreasing(lengths, capacity):
    """The rule as a textbook writes it, with a scan over all rows."""
    rows = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        left = [capacity - sum(lengths[i] for i in row) for row in rows]
        fitting = [(room, row) for row, room in enumerate(left) if room >= lengths[item]]
        if fitting:
            rows[min(fitting)[1]].append(item)
        else:
            rows.append([item])
    return rows


@given(SETS)
def test_every_item_is_in_one_row_and_no_row_overflows(case):
    lengths, capacity = case
    packing = pack(lengths, capacity)
    rows = [packing[row].tolist() for row in range(len(packing))]
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= capacity for row in rows)


@given(SETS)
def test_long_items_fill_rows_as_best_fit_decreasing_does(case):
    lengths, capacity = case
    lengths = [length for length in lengths if 8 * length > capacity]
    packing, expected = pack(lengths, capacity), best_fit_decreasing(lengths, capacity)
    room = [capacity - sum(lengths[i] for i in packing[row]) for row in range(len(packing))]
    assert sorted(room) == sorted(capacity - sum(lengths[i] for i in row) for row in expected)


def test_a_row_of_short_items_is_a_sample_of_them():
    """Where length tells the kind, a row in decreasing order would hold one or two of ten kinds."""
    kinds = np.random.default_rng(0).integers(10, size=5_000)
    lengths = 20 + 5 * kinds
    packing = pack(lengths, 1024)
    assert lengths.sum() / (1024 * len(packing)) > 0.985
    seen = [len(set(kinds[packing[row]])) for row in range(len(packing))]
    # Of 24 items drawn at random: 10 - 10 * 0.9 ** 24 = 9.2.
    assert np.mean(seen) == pytest.approx(9.2, abs=0.5)


@given(SETS)
def test_no_two_rows_fit_into_one(case):
    lengths, capacity = case
    packing = pack(lengths, capacity)
    used = sorted(sum(lengths[i] for i in packing[row]) for row in range(len(packing)))
    assert len(used) < 2 or used[0] + used[1] > capacity


def test_a_large_set_is_packed_tightly_and_always_the_same():
    lengths = np.random.default_rng(0).lognormal(5, 1, 50_000).astype(int).clip(1, 4096)
    packing = pack(lengths, 4096)
    assert lengths.sum() / (4096 * len(packing)) > 0.995
    again = pack(lengths.tolist(), 4096)
    assert (again.order == packing.order).all()
    assert (again.starts == packing.starts).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a row holds 8"):
        pack([3, 9], 8)


@given(st.integers(1, 300), st.integers(2, 40))
def test_pieces_predict_each_token_once(length, capacity):
    cut = [range(length)[piece] for piece in pieces(length, capacity)]
    assert all(1 <= len(piece) <= capacity for piece in cut)
    predicted = [token for piece in cut for token in piece[1:]]
    assert predicted == list(range(1, length))
