"""A head dealt by rows to two processes gives the loss and the gradients of the whole head."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from vocab_ranks import BATCH, HIDDEN, TIME, differentiate, inputs
from warm_python import python


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes have computed."""
    folder = tmp_path_factory.mktemp("vocab")
    done = python(Path(__file__).with_name("vocab_ranks.py"), folder, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


CASES = {
    "float64": (torch.float64, 1.0, 1e-12),
    "float32 in chunks": (torch.float32, 1.0, 1e-5),
    "far apart": (torch.float64, 1e3, 1e-12),
}


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_have_what_one_process_has(ranks, case):
    dtype, spread, tolerance = CASES[case]
    hidden, weight, *rest = inputs(dtype, spread=spread)
    expected = differentiate(hidden, weight.requires_grad_(), *rest)
    for seen in ranks:
        for ours, theirs in zip(seen[case], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_the_loss_is_that_of_all_logits(ranks):
    hidden, weight, targets, _ = inputs(torch.float64)
    logits = F.linear(hidden, weight)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    lse = logits.logsumexp(-1) * (targets != -100)
    for seen in ranks:
        torch.testing.assert_close(seen["float64"][0].flatten(), nll)
        torch.testing.assert_close(seen["float64"][1], lse)


def test_ranks_agree_to_the_last_bit(ranks):
    for case in CASES:
        for ours, theirs in zip(ranks[0][case], ranks[1][case], strict=True):
            assert torch.equal(ours, theirs)


def test_neither_logits_nor_the_head_are_ever_whole(ranks):
    tokens, rows, own, number = BATCH * TIME, 8192, 8192 // 2, 4
    for seen in ranks:
        assert seen["largest"] == own * HIDDEN * number  # its rows and their gradient
        assert seen["largest"] < min(rows * HIDDEN, tokens * own) * number


def test_only_rows_can_be_dealt(ranks):
    expected = "a head of 8192 rows lies as (Replicate(),) on 2 processes"
    assert all(seen["error"].startswith(expected) for seen in ranks)


def test_a_target_is_compared_with_all_rows(ranks):
    expected = "target 8192 is not a token of a vocabulary of 8192."
    assert all(seen["outside"] == expected for seen in ranks)
