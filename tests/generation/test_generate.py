"""Sampling and generating, against brute force."""

import pytest
import torch

from smol.generation import generate, sample
from smol.model import Decoder, DecoderConfig, init_weights


@pytest.fixture(scope="module")
def decoder():
    made = Decoder(DecoderConfig(61, 32, 2, 2, 1, 64, nope=2))
    init_weights(made, std=0.3, seed=1)
    return made.eval()


def test_greedy_takes_the_likeliest_token_of_the_whole_text(decoder):
    tokens = [5, 9, 2]
    for token in generate(decoder, tokens, 12, context=64, temperature=0):
        with torch.no_grad():
            assert token == int(decoder(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)
    assert len(tokens) == 15


def test_stops_at_a_stop_token_and_keeps_the_context(decoder):
    free = generate(decoder, [5, 9, 2], 12, context=64, temperature=0)
    stopped = generate(decoder, [5, 9, 2], 12, context=64, temperature=0, stop=[free[4]])
    assert stopped == free[: free.index(free[4])]
    assert len(generate(decoder, [5] * 20, 3, context=4, temperature=0)) == 3


def test_the_same_seed_writes_the_same(decoder):
    texts = [generate(decoder, [1], 20, 64, temperature=1.0, seed=s) for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(40_000, 4)
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(sample(logits, 0.7, 1.0, generator), minlength=4) / 40_000
    torch.testing.assert_close(counts, torch.softmax(logits[0] / 0.7, 0), atol=0.01, rtol=0)


def test_nucleus_is_the_smallest_set_that_holds_top_p():
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    drawn = sample(probabilities.log().expand(2000, 4), 1.0, 0.7)
    assert set(drawn.tolist()) == {1, 3}
    assert set(sample(probabilities.log().expand(50, 4), 1.0, 0.4).tolist()) == {1}
