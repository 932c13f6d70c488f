"""Filters and draws, against transformers' and against counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smol.errors import UserError
from smol.generation import Sampling
from smol.generation.choice import choose, penalize_repetition, sample


def warped(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution that transformers draws from, ``(rows, vocab)``."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers(None, logits).softmax(-1)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    temperature=st.floats(0.3, 2),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0.05, 0.99),
    min_p=st.none() | st.floats(0.001, 0.9),
    candidates=st.integers(1, 40),
)
def test_draws_have_the_distribution_of_transformers(
    seed, temperature, top_k, top_p, min_p, candidates
):
    sampling = Sampling(temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed)) * 2
    expected = warped(logits, sampling)[0]
    count = 4000
    # Numbers at equal distances: each token comes as often as its probability says, to within one.
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5).unsqueeze(1) / count
    tokens = sample(logits.expand(count, -1), sampling, uniforms, candidates)
    found = torch.bincount(tokens, minlength=32) / count
    assert (found - expected).abs().max() <= 2 / count


def test_rows_have_settings_of_their_own():
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0))
    samplings = [
        Sampling(0),
        Sampling(1.0, top_p=0.9),
        Sampling(1.0),
        Sampling(1.0, top_k=3),
        Sampling(1.0, top_p=0.9),
        Sampling(0.0, top_k=3),
    ]
    uniforms = [0.1, 0.999, 0.5, 0.7, 0.2, 0.9]
    together = choose(logits, samplings, uniforms)
    for row in range(6):
        alone = choose(logits[row : row + 1], samplings[row : row + 1], uniforms[row : row + 1])
        assert alone.item() == together[row].item()
    assert together[0] == logits[0].argmax()
    assert together[5] == logits[5].argmax()
    assert together[3] in logits[3].topk(3).indices


def test_the_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    text = [3, 9, 9, 41, 3]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([text]), logits.clone())
    penalize_repetition(logits[0], text, 1.7)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature is -1, expected a number, 0 or more"),
        ({"top_k": 0}, "top_k is 0, expected a whole number, at least 1"),
        ({"top_p": 1.5}, "top_p is 1.5, expected 0 < top_p <= 1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a whole number, at least 1"),
        ({"stop": ("",)}, "stop is .* not empty"),
        ({"seed": -1}, "seed is -1"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a number"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"top_k": 2.5}, "top_k is 2.5, expected a whole number"),
        ({"top_p": True}, "top_p is True"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"stop": ("a", 5)}, "stop is .*'a', 5.* expected strings"),
        ({"stop": 5}, "stop is .*5"),
        ({"stop_ids": ["2"]}, "stop_ids is .*'2'.* expected whole numbers"),
    ],
)
def test_mistakes_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


def test_one_stop_needs_no_tuple():
    assert Sampling(stop="END", stop_ids=7) == Sampling(stop=["END"], stop_ids=[7])


def test_a_temperature_that_float32_has_not_takes_the_likeliest():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert sample(logits, Sampling(temperature=1e-320), torch.tensor([[0.0]]).double()) == 1
