"""Schedules against hand-computed values and rules that hold for all of them."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smol.errors import UserError
from smol.optim import WSD, Constant, Cosine


def test_warmup_by_hand():
    for schedule in (Constant(4), WSD(4), Cosine(4, total_steps=10)):
        assert [schedule(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert Constant()(0) == 1.0


def test_linear_decay_by_hand():
    schedule = WSD(warmup_steps=2, decay_steps=4, total_steps=10)
    by_hand = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [schedule(step) for step in range(12)] == by_hand


def test_sqrt_decay_by_hand():
    schedule = WSD(warmup_steps=0, decay_steps=4, decay_start_step=3, shape="sqrt", final=0.2)
    assert schedule(3) == 1.0
    assert schedule(4) == pytest.approx(0.2 + 0.8 * 0.5)
    assert schedule(6) == pytest.approx(0.2 + 0.8 * (1 - math.sqrt(0.75)))
    assert schedule(7) == pytest.approx(0.2)


def test_cosine_by_hand():
    schedule = Cosine(warmup_steps=2, total_steps=10, final=0.1)
    assert schedule(2) == 1.0
    assert schedule(4) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5)))
    assert schedule(6) == pytest.approx(0.55)
    assert schedule(10) == schedule(99) == pytest.approx(0.1)


def test_smollm3():
    """Warm-up of 2000 steps, linear decay to zero between steps 4,198,000 and 4,720,000."""
    schedule = WSD(warmup_steps=2000, decay_steps=522_000, total_steps=4_720_000)
    assert schedule(999) == 0.5
    assert schedule(1999) == schedule(2000) == schedule(4_198_000) == 1.0
    assert schedule(4_459_000) == 0.5
    assert schedule(4_719_999) == pytest.approx(1 / 522_000)
    assert schedule(4_720_000) == 0.0
    by_start = WSD(warmup_steps=2000, decay_steps=522_000, decay_start_step=4_198_000)
    assert by_start(4_300_000) == schedule(4_300_000)


def test_a_decay_added_later_leaves_the_past_alone():
    without = WSD(warmup_steps=3)
    decayed = WSD(warmup_steps=3, decay_steps=5, decay_start_step=20)
    assert [without(step) for step in range(21)] == [decayed(step) for step in range(21)]


@st.composite
def schedules(draw):
    warmup = draw(st.integers(0, 50))
    final = draw(st.floats(0, 1))
    if draw(st.booleans()):
        return Cosine(warmup, warmup + draw(st.integers(1, 100)), final)
    decay = draw(st.integers(1, 100))
    start = warmup + draw(st.integers(0, 100))
    shape = draw(st.sampled_from(["linear", "sqrt"]))
    return WSD(warmup, decay, decay_start_step=start, shape=shape, final=final)


@given(schedules())
def test_rises_to_one_then_falls_to_final(schedule):
    values = [schedule(step) for step in range(260)]
    warmup = schedule.warmup_steps
    assert all(0 <= value <= 1 for value in values)
    assert all(0 < a < b for a, b in pairwise(values[:warmup]))
    assert values[warmup] == 1.0
    assert all(a >= b for a, b in pairwise(values[warmup:]))
    assert values[-1] == pytest.approx(schedule.final)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: WSD(5, decay_steps=10), "exactly one"),
        (lambda: WSD(5, decay_steps=10, total_steps=50, decay_start_step=40), "exactly one"),
        (lambda: WSD(5, decay_steps=10, total_steps=12), "before its warm-up"),
        (lambda: WSD(5, decay_start_step=12), "no decay_steps"),
        (lambda: WSD(5, decay_steps=1, total_steps=9, shape="cubic"), "shape"),
        (lambda: WSD(5, decay_steps=1, total_steps=9, final=2.0), "final"),
        (lambda: Cosine(5, total_steps=5), "must be larger"),
        (lambda: Constant(-1), "warmup_steps"),
    ],
)
def test_mistakes_are_one_line(build, message):
    with pytest.raises(UserError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
