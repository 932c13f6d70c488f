"""Activation checkpointing changes the memory of a decoder and nothing else."""

import weakref
from typing import get_args

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smol.errors import UserError
from smol.losses import linear_cross_entropy
from smol.model import Decoder, DecoderConfig, init_weights
from smol.model.activation_checkpointing import ActivationCheckpointing

KINDS = get_args(ActivationCheckpointing)
TOKENS = torch.arange(2 * 96).reshape(2, 96).remainder(37)
DOCUMENTS = (TOKENS % 11 == 0).cumsum(dim=1)


class Memory(TorchDispatchMode):
    """Counts the bytes of what is computed and still alive, and the matrix products."""

    def __init__(self):
        super().__init__()
        self.alive, self.products = 0, 0
        self._seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        inputs = {id(x.untyped_storage()) for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage not in self._seen and id(storage) not in inputs:
                    self._seen.add(storage)
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self._forget, storage.nbytes())
        return output

    def _forget(self, size):
        self.alive -= size


def build(kind, **features):
    shape = {"vocab_size": 37, "hidden_size": 32, "num_layers": 4, "num_heads": 4}
    shape |= {"num_kv_heads": 2, "intermediate_size": 96, "nope": 2}
    decoder = Decoder(DecoderConfig(**(shape | features)), activation_checkpointing=kind)
    init_weights(decoder, seed=3)
    return decoder


def step(decoder, documents=DOCUMENTS):
    """Loss, gradients, bytes that wait for the backward pass, and products in it."""
    torch.manual_seed(0)
    with Memory() as memory:
        loss = decoder(
            TOKENS,
            documents=documents,
            head=lambda hidden, weight: linear_cross_entropy(hidden, weight, TOKENS)[0].sum(),
        )
        kept, forward = memory.alive, memory.products
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in decoder.named_parameters()}
    return loss.detach(), gradients, kept, memory.products - forward


@pytest.mark.parametrize("features", [{}, {"dropout": 0.3, "qk_norm": True}], ids=["", "dropout"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_gradients_are_the_same_to_the_last_bit(kind, documents, features):
    expected, theirs, _, _ = step(build("none", **features), documents)
    loss, ours, _, _ = step(build(kind, **features), documents)
    assert torch.equal(loss, expected)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.equal(ours[name], gradient), name


def test_each_kind_keeps_less_than_the_one_before():
    kept = {kind: step(build(kind))[2] for kind in KINDS}
    assert kept["selective"] < 0.75 * kept["none"]
    assert kept["full"] < 0.4 * kept["selective"]


def test_only_full_repeats_matrix_products():
    products = {kind: step(build(kind))[3] for kind in KINDS}
    assert products["selective"] == products["none"]
    # Of seven in each of four layers, the last one's result is needed by no gradient.
    assert products["full"] - products["none"] == 4 * 6


def test_nothing_is_kept_where_no_gradient_is_asked_for():
    decoder = build("full")
    with torch.no_grad(), Memory() as memory:
        logits = decoder(TOKENS)
    assert memory.alive == logits.nbytes


def test_parameters_keep_their_names():
    names = [name for name, _ in build("none").named_parameters()]
    assert [name for name, _ in build("full").named_parameters()] == names


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_blocks_can_be_compiled(kind):
    expected, theirs, _, _ = step(build("none"))
    decoder = build(kind)
    torch._dynamo.reset()
    counters.clear()
    for layer in decoder.model.layers:
        layer.compile()
    loss = decoder(
        TOKENS,
        documents=DOCUMENTS,
        head=lambda hidden, weight: linear_cross_entropy(hidden, weight, TOKENS)[0].sum(),
    )
    loss.backward()
    # A break in what is checkpointed would leave the whole block to the interpreter.
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def test_an_unknown_kind_is_one_line():
    with pytest.raises(UserError) as error:
        build("ful")
    assert str(error.value) == (
        "activation_checkpointing 'ful' is unknown; expected one of none, selective, full. "
        "Did you mean 'full'?"
    )
