"""What benchmarks compute beside times, and that each way of training trains the same model."""

import itertools
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launch_parts import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from pairs import median_interval
from training_peers import Job, Training
from training_step import MODELS, document_lengths, matmul_rate


@pytest.mark.parametrize("count", [2, 6, 9, 12])
def test_the_interval_of_a_median_is_the_tightest_that_covers_it(count):
    # Each value lies on either side of the true median 0 with equal chance.
    def missed(ends):
        low, high = ends
        samples = [sorted(signs) for signs in itertools.product((-1, 1), repeat=count)]
        return sum(s[low] > 0 or s[high] < 0 for s in samples) / 2**count

    _, low, high = median_interval(list(range(count)))
    assert high == count - 1 - low
    assert missed((low, high)) <= 0.05 or low == 0
    assert low + 1 > (count - 1) // 2 or missed((low + 1, high - 1)) > 0.05


@given(st.integers(1, 5), st.integers(1, 600))
def test_documents_fill_rows_and_cross_none(rows, time):
    lengths = document_lengths(rows, time)
    assert min(lengths) > 0
    ends = set(itertools.accumulate(lengths))
    assert {time * (row + 1) for row in range(rows)} <= ends
    assert max(ends) == rows * time


@pytest.mark.parametrize("autocast", [False, True])
def test_all_ways_train_the_same_model(autocast):
    decoder, theta = MODELS["smallest"]
    ours, theirs = (
        Training(Job(way, decoder, theta, 2, [24, 24], autocast))
        for way in ("smol", "transformers")
    )
    assert ours.parameters == theirs.parameters
    missing, unexpected = theirs.model.load_state_dict(ours.model.state_dict(), strict=False)
    assert set(missing) <= {"lm_head.weight"}  # which is tied
    assert not unexpected
    losses = [(ours.step(), theirs.step()) for _ in range(3)]
    for one, other in losses:
        assert one == pytest.approx(other, rel=1e-2 if autocast else 1e-5)
    assert losses[2][0] < losses[0][0]


def test_the_rate_of_products_is_positive():
    assert matmul_rate(torch.float32, process_time=True, size=256, repeats=2) > 1e6
