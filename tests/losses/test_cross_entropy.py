"""The chunked linear cross-entropy against the formula written out, alone and on two ranks."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from warm_python import python

from smol.losses import linear_cross_entropy
from smol.losses.cross_entropy import SMALLEST_CHUNK, TILE_ELEMENTS


def naive(hidden, weight, targets, ignore_index=-100):
    """The formula, with all logits whole."""
    logits = hidden.double() @ weight.double().T
    ignored = targets == ignore_index
    lse = logits.exp().sum(-1).log()
    chosen = logits.gather(-1, targets.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return (lse - chosen).masked_fill(ignored, 0), lse.masked_fill(ignored, 0)


def inputs(shape, vocab, size, dtype=torch.float64, ignored=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, size, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, size, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocab, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < ignored] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@given(
    shape=st.sampled_from([(1,), (5,), (2, 3), (2, 0), (3, 1, 2)]),
    vocab=st.integers(1, 40),
    size=st.integers(1, 9),
    chunk_size=st.none() | st.integers(1, 50),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 10),
)
@settings(max_examples=80, deadline=None)
def test_values_and_gradients_equal_the_formula(shape, vocab, size, chunk_size, ignored, seed):
    hidden, weight, targets = inputs(shape, vocab, size, ignored=ignored, seed=seed)
    ours = linear_cross_entropy(hidden, weight, targets, chunk_size=chunk_size)
    expected = naive(hidden, weight, targets)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.shape == targets.shape
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
    gradients = [torch.autograd.grad(x, (hidden, weight), cotangents) for x in (ours, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("chunk_size", [3, 10, 11, None])
def test_gradcheck(chunk_size):
    hidden, weight, targets = inputs((2, 4), 10, 3)

    def function(hidden, weight):
        nll, lse = linear_cross_entropy(hidden, weight, targets, chunk_size=chunk_size)
        return nll, lse.square()

    assert torch.autograd.gradcheck(function, (hidden, weight))


@pytest.mark.parametrize("used", ["nll", "lse"])
def test_one_result_may_be_left_unused(used):
    hidden, weight, targets = inputs((6,), 10, 3)
    index = ["nll", "lse"].index(used)
    gradients = [
        torch.autograd.grad(function(hidden, weight, targets)[index].sum(), (hidden, weight))
        for function in (linear_cross_entropy, naive)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_frozen_inputs(frozen):
    hidden, weight, targets = inputs((6,), 10, 3)
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    nll, _ = linear_cross_entropy(hidden, weight, targets)
    assert nll.requires_grad is (frozen != "both")
    if frozen != "both":
        trained = weight if frozen == "hidden" else hidden
        expected = torch.autograd.grad(naive(hidden, weight, targets)[0].sum(), trained)
        torch.testing.assert_close(torch.autograd.grad(nll.sum(), trained), expected)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets)[0], nll)


def test_everything_ignored_gives_zero_and_zero_gradients():
    hidden, weight, targets = inputs((2, 5), 10, 3, ignored=1.0)
    nll, lse = linear_cross_entropy(hidden, weight, targets)
    (nll.sum() + lse.square().sum()).backward()
    for x in (nll, lse, hidden.grad, weight.grad):
        assert torch.equal(x, torch.zeros_like(x))


def test_ignore_index_may_be_a_token():
    hidden, weight, targets = inputs((20,), 4, 3, ignored=0.0)
    nll, _ = linear_cross_entropy(hidden, weight, targets, ignore_index=2)
    torch.testing.assert_close(nll, naive(hidden, weight, targets, ignore_index=2)[0])


def test_large_logits_do_not_overflow():
    hidden, weight, targets = inputs((8,), 50, 4, dtype=torch.float32, ignored=0.0)
    nll, lse = linear_cross_entropy(hidden * 1e4, weight, targets, chunk_size=7)
    logits = hidden.double() * 1e4 @ weight.double().T
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        nll.double(), F.cross_entropy(logits, targets, reduction="none"), rtol=1e-4, atol=0.05
    )


@pytest.mark.parametrize("mode", ["autocast", "bfloat16"])
def test_bfloat16_errs_no_more_than_the_naive_way(mode):
    hidden, weight, targets = inputs((256,), 3000, 64, dtype=torch.float32)
    scaled = (weight * 0.1).detach()
    exact_inputs = hidden, scaled.requires_grad_()
    exact = naive(*exact_inputs, targets)[0]
    exact_gradients = torch.autograd.grad(exact.sum(), exact_inputs)

    def low_precision(function):
        dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
        x, w = (t.detach().to(dtype).requires_grad_() for t in exact_inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            nll = function(x, w)
        assert nll.dtype == torch.float32
        gradients = torch.autograd.grad(nll.sum(), (x, w))
        assert [g.dtype for g in gradients] == [dtype, dtype]
        results = [(nll, exact), *zip(gradients, exact_gradients, strict=True)]
        return [((a.double() - b).norm() / b.norm()).item() for a, b in results]

    ours = low_precision(lambda x, w: linear_cross_entropy(x, w, targets, chunk_size=700)[0])
    whole = low_precision(
        lambda x, w: F.cross_entropy(F.linear(x, w).float(), targets, reduction="none")
    )
    print("relative errors of nll, hidden and weight gradients", ours, "naive", whole)
    for mine, theirs in zip(ours, whole, strict=True):
        assert mine < 1.25 * theirs  # each chunk of the head rounds its product once more


def test_backward_ignores_the_autocast_around_it():
    hidden, weight, targets = inputs((16,), 30, 8, dtype=torch.float32)
    gradients = []
    for enabled in (True, False):
        nll, _ = linear_cross_entropy(hidden, weight, targets)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(nll.sum(), (hidden, weight)))
    assert all(map(torch.equal, *gradients))


def test_logits_are_never_whole(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.numel())
            return out

    monkeypatch.setitem(TILE_ELEMENTS, "cpu", 1)
    vocab, size, tokens = 20 * SMALLEST_CHUNK, 4, 100
    hidden, weight, targets = inputs((tokens,), vocab, size, dtype=torch.float32)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, targets)[0].sum().backward()
    assert largest.elements <= max(tokens * SMALLEST_CHUNK, vocab * size)


@pytest.mark.parametrize("stranger", [-1, 10])
def test_targets_outside_the_vocabulary_are_refused(stranger):
    hidden, weight, targets = inputs((6,), 10, 3)
    targets[2] = stranger
    with pytest.raises(IndexError, match=f"target {stranger} is not a token"):
        linear_cross_entropy(hidden, weight, targets)


def test_two_sharded_ranks_equal_one_process():
    done = python(Path(__file__).with_name("fsdp_ranks.py"), ranks=2)
    assert done.returncode == 0, done.stderr
