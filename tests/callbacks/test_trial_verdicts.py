"""What is judged to be wrong with batches, losses, speeds and sums."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from callbacks.parts.collectives import AllReduce
from callbacks.parts.trial_data import find_fault, fingerprints, shared_rows
from callbacks.parts.trial_run import Measured
from callbacks.parts.trial_verdicts import judge_collectives, judge_loss, judge_throughput, unusual
from smol.data.batch import IGNORE, TokenBatch, token_tensors

EOS = 0
blocks = st.integers(1, 3).flatmap(
    lambda rows: st.lists(
        st.lists(st.integers(0, 5), min_size=9, max_size=9), min_size=rows, max_size=rows
    )
)


def make_batch(rows):
    tensors = token_tensors(np.array(rows), EOS)
    return TokenBatch(**tensors, sources=torch.zeros(len(rows), dtype=torch.int64))


@given(blocks, st.data())
def test_every_damage_to_a_batch_is_found(rows, data):
    assert find_fault(make_batch(rows), 6) is None
    batch = make_batch(rows)
    name = data.draw(st.sampled_from(["tokens", "targets", "positions"]))
    first = 1 if name == "tokens" else 0  # nothing says what comes before the first target
    last = 6 if name == "targets" else 7  # nor what after the last
    place = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.integers(first, last))
    getattr(batch, name)[place] += data.draw(st.sampled_from([-2, -1, 1, 2]))
    assert find_fault(batch, 6) is not None


def test_a_row_begins_at_zero():
    batch = make_batch([[1, EOS, 2, 3, 4, 5, 1, 2, 3]])
    batch.positions[0, 0] = 3
    assert find_fault(batch, 6) is not None


def test_a_target_that_is_ignored_is_no_fault():
    batch = make_batch([[1, 2, 3, 4, 5, 1, 2, 3, 4]])
    batch.targets[0, 2:5] = IGNORE
    assert find_fault(batch, 6) is None
    assert find_fault(batch, None) is None
    assert find_fault((torch.ones(3), torch.tensor([1])), None) is None
    assert find_fault((torch.tensor([1.0, math.inf]), torch.tensor([1])), None) == "not finite"


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=4))
def test_shared_rows(ranks):
    shares = [
        sum(any(row in other for j, other in enumerate(ranks) if j != i) for row in own) / len(own)
        for i, own in enumerate(ranks)
        if own
    ]
    found = shared_rows([np.array(own, dtype=np.uint64) for own in ranks])
    assert found == pytest.approx(max(shares, default=0.0))


def test_fingerprints_tell_rows_apart():
    batch = make_batch([[1, 2, 3, 4, 5, 1, 2, 3, 4], [1, 2, 3, 4, 5, 1, 2, 4, 4]])
    a, b = fingerprints(batch)
    assert a != b
    assert fingerprints(make_batch([[1, 2, 3, 4, 5, 1, 2, 3, 5]])) == [a]  # the same eight tokens


@pytest.mark.parametrize(("processes", "crossings"), [(2, 1.0), (4, 1.5), (8, 1.75)])
def test_bus_bandwidth(processes, crossings):
    """As nccl-tests define it: 16 MiB in 10 ms."""
    seen = [AllReduce(processes, 2**22, 0, 0.01)] * processes
    verdict = judge_collectives(seen, 2.0)
    speed = crossings * 2**24 / 0.01 / 1e9
    assert verdict.values["bus_gigabytes_per_second"] == pytest.approx(speed)
    assert verdict.passed == (speed >= 2.0)


def test_the_tenths_of_the_losses():
    falling = [3.0] * 10 + [9.0] * 80 + [2.9] * 10
    assert judge_loss(falling, 0.05, begins_anew=True).passed
    assert not judge_loss(falling, 0.2, begins_anew=True).passed
    assert judge_loss(falling[::-1], None, begins_anew=True).passed
    assert judge_loss(falling[::-1], 0.05, begins_anew=False).passed  # trained weights may stay
    assert not judge_loss([2.0, 3.5], 0.05, begins_anew=False).passed
    assert not judge_loss([math.inf, 3.5], 0.05, begins_anew=True).passed
    assert not judge_loss([3.5, math.nan], None, begins_anew=True).passed


def measured(seconds, product=1.0, tokens=100):
    steps = len(seconds)
    return Measured(
        seconds=seconds, data_seconds=[0.5] * steps, tokens=[tokens] * steps,
        product_seconds=product,
    )  # fmt: skip


def test_speed_is_that_of_all_processes_once_they_have_set_up():
    ranks = [measured([60.0, 1.0, 1.0, 1.0]), measured([60.0, 1.0, 1.0, 1.0])]
    values = judge_throughput(ranks, None).values
    assert values["per_second"] == pytest.approx(200)
    assert values["data_share"] == pytest.approx(0.5)
    values = judge_throughput([measured([60.0, 2.0, 2.0], tokens=0)], None).values
    assert (values["per_second"], values["unit"]) == (0.5, "steps/s")


def test_what_is_unusual():
    slow = judge_throughput([measured([9.0, 1.0, 1.0, 4.0])] * 2 + [measured([1.0] * 4, 2.0)], None)
    assert unusual(slow, 6.0, 384) == {
        "slow_step": "the slowest trial step took 4.0 times the median",
        "slow_process": "process 2 computes 2.0 times as long as the median",
    }
    usual = judge_throughput([measured([9.0, 1.0, 1.0, 2.0], 1.2), measured([1.0] * 4)], None)
    assert unusual(usual, 6.0, 384) == {}
    assert set(unusual(usual, 9.0, 384)) == {"first_loss"}
    assert unusual(usual, 2.0, None) == {}
