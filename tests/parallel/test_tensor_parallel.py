"""Decoders dealt to tensor-parallel ranks against one process."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tensor_ranks import (
    CLIP,
    DECODERS,
    build,
    change_what_is_constant,
    initialize,
    results,
    weights,
)
from warm_python import python

from smol.errors import UserError
from smol.model import DecoderConfig
from smol.parallel.tensor_parallel import check_divisible

KINDS = [
    pytest.param(2, id="2 ranks"),
    pytest.param(4, id="2 x 2 ranks", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """A function that returns what each of so many ranks has computed."""
    made = {}

    def run(size):
        if size in made:
            return made[size]
        folder = tmp_path_factory.mktemp("ranks")
        done = python(Path(__file__).with_name("tensor_ranks.py"), folder, ranks=size)
        assert done.returncode == 0, done.stderr[-3000:]
        made[size] = [torch.load(folder / f"{rank}.pt") for rank in range(size)]
        return made[size]

    return run


@pytest.fixture(scope="module")
def one():
    """What one process computes."""
    seen = {}
    for name, features in DECODERS.items():
        decoder = initialize(build(**features))
        seen[f"{name} weights"] = weights(decoder)
        change_what_is_constant(decoder)
        seen[name] = results(decoder)
    return seen


@pytest.mark.parametrize("size", KINDS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_ranks_begin_with_the_weights_of_one_process(launch, one, decoder, size):
    expected, _ = one[f"{decoder} weights"]
    for seen in launch(size):
        assembled, _ = seen[f"{decoder} weights"]
        assert assembled.keys() == expected.keys()
        for name, weight in expected.items():
            assert torch.equal(assembled[name], weight), name


def alike(parts):
    """Names of the random weights whose parts on two ranks are correlated."""
    found = set()
    for ours, theirs in pairwise(parts):
        for name, part in ours.items():
            both = part.flatten(), theirs[name].flatten()
            if part.dim() == 2 and abs(torch.corrcoef(torch.stack(both))[0, 1]) > 0.2:
                found.add(name)
    return found


@pytest.mark.parametrize("decoder", DECODERS)
def test_ranks_draw_different_numbers(launch, decoder):
    parts = [seen[f"{decoder} weights"][1] for seen in launch(2)]
    assert alike(parts) == set()
    # As when each rank fills its own part with one seed for all.
    for rank in parts:
        generator = torch.Generator().manual_seed(0)
        name = "model.layers.1.mlp.up_proj.weight"
        rank[name] = torch.empty_like(rank[name]).normal_(0, 0.02, generator=generator)
    assert alike(parts) == {name}


@pytest.mark.parametrize("size", KINDS)
@pytest.mark.parametrize("time", ["even", "odd"])
@pytest.mark.parametrize("head", ["cross_entropy", "sharded_aware"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_losses_and_gradients(launch, one, decoder, head, time, size):
    losses, gradients, norm, _ = one[decoder][f"{head} {time}"]
    for seen in launch(size):
        ours = seen[decoder][f"{head} {time}"]
        torch.testing.assert_close(ours[0], losses, rtol=1e-5, atol=1e-5)
        assert ours[1].keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(ours[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
        assert float(ours[2]) == pytest.approx(float(norm), rel=1e-5)
        assert float(ours[3]) == pytest.approx(CLIP, rel=1e-4)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("what", ["logits", "last"])
def test_any_head_sees_all_tokens_and_rows(launch, one, what, decoder):
    for seen in launch(2):
        torch.testing.assert_close(seen[decoder][what], one[decoder][what], rtol=1e-5, atol=1e-5)


def test_ranks_drop_elements_of_their_own(launch):
    (ours, error), (theirs, _) = (seen["dropout"] for seen in launch(2))
    assert ours.shape == theirs.shape == (2, 8, 32)  # each has half of the time
    # An element stays as it was if both branches were dropped, a quarter of them.
    assert 0.2 < float(ours.float().mean()) < 0.3
    assert 0.03 < float((ours & theirs).float().mean()) < 0.1  # a sixteenth, not a quarter
    assert "a sequence has 7 tokens, which tensor_parallel_size 2 does not divide" in error


@pytest.mark.parametrize(
    ("key", "fields", "context"),
    [
        ("model.decoder.num_heads is 3", {"num_heads": 3, "num_kv_heads": 1}, 32),
        ("model.decoder.num_kv_heads is 1", {"num_kv_heads": 1}, 32),
        ("model.decoder.intermediate_size is 65", {"intermediate_size": 65}, 32),
        ("model.decoder.vocab_size is 101", {"vocab_size": 101}, 32),
        ("data.context_length is 33", {}, 33),
    ],
)
def test_what_does_not_divide_is_named(key, fields, context):
    shape = {"vocab_size": 102, "hidden_size": 48, "num_layers": 1, "num_heads": 4}
    shape |= {"num_kv_heads": 2, "intermediate_size": 66} | fields
    with pytest.raises(UserError) as error:
        check_divisible(DecoderConfig(**shape), context, 2)
    assert str(error.value) == (
        f"{key}, which tensor_parallel_size 2 does not divide; expected a multiple of it"
    )
