"""Loss by source and position, against a loop over all tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smol.data.batch import IGNORE
from smol.evaluation.loss_by_position import LossByPosition

SOURCES = ("code", "maths", "prose")


def make_batch(generator, rows, time):
    """Documents of random lengths, a sixth of the targets hidden."""
    begins = torch.rand(rows, time, generator=generator) < 0.1
    positions = torch.zeros(rows, time, dtype=torch.int64)
    for t in range(1, time):
        positions[:, t] = (positions[:, t - 1] + 1) * ~begins[:, t]
    targets = torch.randint(0, 50, (rows, time), generator=generator)
    targets[torch.rand(rows, time, generator=generator) < 1 / 6] = IGNORE
    nll = torch.rand(rows, time, generator=generator) * 10
    sources = torch.randint(0, 2, (rows,), generator=generator)  # no prose
    return nll, targets, positions, sources


def brute_force(batches):
    """Nats and tokens by (source, first position of the bin)."""
    cells = {}
    for nll, targets, positions, sources in batches:
        for row, source in enumerate(sources.tolist()):
            for t in range(nll.shape[1]):
                if targets[row, t] == IGNORE:
                    continue
                first = 0 if positions[row, t] == 0 else 1
                while first > 0 and 2 * first <= positions[row, t]:
                    first *= 2
                nats, tokens = cells.get((SOURCES[source], first), (0.0, 0))
                cells[SOURCES[source], first] = (nats + float(nll[row, t]), tokens + 1)
    return cells


@given(st.integers(0, 10**6), st.lists(st.integers(1, 70), min_size=1, max_size=3))
def test_equals_a_loop_over_tokens(seed, lengths):
    generator = torch.Generator().manual_seed(seed)
    batches = [make_batch(generator, rows=3, time=time) for time in lengths]
    metric = LossByPosition(SOURCES)
    for batch in batches:
        metric.update(*batch)
    result, expected = metric.compute(), brute_force(batches)
    assert result["context"] == result["edges"][-1] == max(lengths)
    seen = {}
    for name, source in result["sources"].items():
        by_position = source["by_position"]
        columns = (result["edges"][:-1], by_position["loss"], by_position["tokens"])
        for first, loss, tokens in zip(*columns, strict=True):
            assert (loss is None) == (tokens == 0)
            if tokens:
                seen[name, first] = (loss * tokens, tokens)
    assert seen == {key: (pytest.approx(nats), tokens) for key, (nats, tokens) in expected.items()}
    for name, source in [*result["sources"].items(), ("all", result["all"])]:
        cells = [v for (of, _), v in expected.items() if name in (of, "all")]
        assert source["tokens"] == sum(tokens for _, tokens in cells)
        assert source["loss"] == pytest.approx(sum(n for n, _ in cells) / max(1, source["tokens"]))


def test_bins_are_powers_of_two_up_to_the_context():
    metric = LossByPosition(["code"])
    positions = torch.arange(300)[None]
    zeros = torch.zeros_like(positions)
    metric.update(positions.float(), zeros, positions, torch.tensor([0]))
    result = metric.compute()
    assert result["edges"] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300]
    code = result["sources"]["code"]["by_position"]
    assert code["tokens"] == [1, 1, 2, 4, 8, 16, 32, 64, 128, 44]
    assert code["loss"] == [0, 1, 2.5, 5.5, 11.5, 23.5, 47.5, 95.5, 191.5, 277.5]


def test_what_is_hidden_may_hold_anything():
    metric = LossByPosition(["code"])
    nll = torch.tensor([[1.0, float("nan")]])
    metric.update(nll, torch.tensor([[3, IGNORE]]), torch.tensor([[0, 1]]), torch.tensor([0]))
    assert metric.compute()["all"]["loss"] == 1.0


def test_special_tokens_stand_for_no_text(sources):
    from smol.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(sources / "tokenizer")
    word = tokenizer.encode("cat")[0]
    metric = LossByPosition(["cats"], tokenizer)
    nll, targets = torch.tensor([[1.0, 50.0, 3.0]]), torch.tensor([[word, tokenizer.eos_id, word]])
    metric.update(nll, targets, torch.tensor([[0, 1, 0]]), torch.tensor([0]))
    assert metric.compute()["all"]["tokens"] == 2
    assert metric.compute()["all"]["loss"] == 2.0


def test_no_token_is_lost_where_positions_go_beyond_the_row():
    metric = LossByPosition(["code"])
    positions = torch.arange(7, 11)[None]
    metric.update(torch.ones(1, 4), torch.ones_like(positions), positions, torch.tensor([0]))
    result = metric.compute()
    assert result["edges"] == [0, 1, 2, 4, 8, 11]
    assert result["all"]["by_position"]["tokens"] == [0, 0, 0, 1, 3]


def test_is_empty_after_a_reset():
    metric = LossByPosition(SOURCES)
    metric.update(*make_batch(torch.Generator().manual_seed(0), 2, 40))
    metric.reset()
    metric.update(*make_batch(torch.Generator().manual_seed(1), 2, 10))
    assert metric.compute()["context"] == 10
    assert 0 < metric.compute()["all"]["tokens"] <= 20
