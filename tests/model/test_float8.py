"""Float8 against its definition, written out in float64, and what it leaves as it was."""

import importlib.util
from functools import partial

import pytest
import torch
import torch.distributed as dist
from lightning import LightningModule
from tiny import make_data, make_module, make_trainer
from torch.distributed.device_mesh import init_device_mesh

from smol.errors import UserError
from smol.losses import linear_cross_entropy
from smol.model import Decoder, DecoderConfig, init_weights
from smol.model.float8 import check_tokens, convert_to_float8
from smol.modules import base
from smol.parallel import shard_decoder

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs torchao"
)
RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
CPU = torch.device("cpu")
TOKENS = torch.arange(2 * 48).reshape(2, 48).remainder(37)


def build(recipe="none", **features):
    shape = {"vocab_size": 37, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    shape |= {"num_kv_heads": 2, "intermediate_size": 48, "nope": 2}
    decoder = Decoder(DecoderConfig(**(shape | features)))
    convert_to_float8(decoder, recipe, CPU, emulate=True)
    init_weights(decoder, seed=3)
    return decoder


def loss_of(decoder):
    head = partial(linear_cross_entropy, targets=TOKENS.roll(-1, dims=1), ignore_index=None)
    return decoder(TOKENS, head=head)[0].mean()


def nearest_float8(x, mantissa, smallest_exponent):
    """The nearest number with so many bits of mantissa, ties to even; float64 in and out."""
    exponent = torch.floor(torch.log2(x.abs().clamp(min=1e-300))).clamp(min=smallest_exponent)
    step = torch.exp2(exponent - mantissa)
    return torch.round(x / step) * step


E4M3, E5M2 = (448.0, 3, -6), (57344.0, 2, -14)
"""Largest number, bits of mantissa, exponent of the smallest normal number (OCP's OFP8)."""


def rounded(x, kind, rows=None):
    """Scale to the range of a float8 type, round, and scale back; ``rows`` share no scale."""
    largest, *layout = kind
    x = x.double()
    top = x.abs().max() if rows is None else x.abs().amax(dim=rows, keepdim=True)
    scale = largest / top
    if rows is not None:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    # The scale and what it multiplies are float32: rounding them twice moves a few numbers.
    return nearest_float8((x * scale).clamp(-largest, largest), *layout) / scale


@needs_torchao
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_layer_multiplies_what_was_rounded(recipe):
    layer = build(recipe).model.layers[0].mlp.gate_proj
    x = torch.randn(32, 32, requires_grad=True)
    cotangent = torch.randn(32, 48)
    output = layer(x)
    output.backward(cotangent)

    w, data, g = layer.weight.detach(), x.detach(), cotangent
    if recipe == "tensorwise":
        one, other, back = rounded(data, E4M3), rounded(w, E4M3), rounded(g, E5M2)
        expected = (one @ other.T, back @ other, back.T @ one)
    else:  # a scale for each vector that a product sums over
        expected = (
            rounded(data, E4M3, rows=1) @ rounded(w, E4M3, rows=1).T,
            rounded(g, E4M3, rows=1) @ rounded(w, E4M3, rows=0),
            rounded(g, E4M3, rows=0).T @ rounded(data, E4M3, rows=0),
        )
    exact = (data.double() @ w.double().T, g.double() @ w.double(), g.double().T @ data.double())
    for seen, ours, full in zip((output, x.grad, layer.weight.grad), expected, exact, strict=True):
        distance = (seen.double() - ours).norm() / ours.norm()
        assert distance < 2e-3
        assert (full - ours).norm() / full.norm() > 5 * distance  # float8 shows


@needs_torchao
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_lowers_the_loss_about_as_float32_does(recipe):
    ends = []
    for kind in ("none", recipe):
        decoder = build(kind)
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
        losses = []
        for _ in range(12):
            loss = loss_of(decoder)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        ends.append(losses[-1])
        assert losses[-1] < losses[0] - 0.5
    assert ends[0] != ends[1]
    assert ends[1] == pytest.approx(ends[0], rel=0.05)


@needs_torchao
def test_parameters_stay_the_same_objects_under_the_same_names():
    decoder = Decoder(DecoderConfig(37, 32, 2, 4, 2, 48))
    before = dict(decoder.named_parameters())
    assert convert_to_float8(decoder, "tensorwise", CPU, emulate=True) == (14, 14)
    after = dict(decoder.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    plain = Decoder(DecoderConfig(37, 32, 2, 4, 2, 48))
    plain.load_state_dict(decoder.state_dict())
    head = type(decoder.model.embed_tokens), type(decoder.model.layers[0].mlp.up_proj).__name__
    assert head == (torch.nn.Embedding, "Float8Linear")


@needs_torchao
def test_layers_that_do_not_fit_are_left_out():
    decoder = Decoder(DecoderConfig(37, 32, 1, 4, 2, 40))
    assert convert_to_float8(decoder, "rowwise", CPU, emulate=True) == (4, 7)
    assert type(decoder.model.layers[0].mlp.up_proj) is torch.nn.Linear
    decoder = Decoder(DecoderConfig(37, 32, 1, 4, 2, 64))
    # The two of keys and values are 16 wide, which leaves parts of 8.
    assert convert_to_float8(decoder, "rowwise", CPU, parts=2, emulate=True) == (5, 7)


@needs_torchao
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_sharding_and_checkpointing_change_nothing(recipe, tmp_path):
    expected = build(recipe)
    loss_of(expected).backward()
    sharded = build(recipe)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        for layer in sharded.model.layers:
            layer.activation_checkpointing = "selective"
        shard_decoder(sharded, init_device_mesh("cpu", (1,)))
        assert list(sharded.state_dict()) == list(expected.state_dict())
        loss_of(sharded).backward()
        for name, parameter in sharded.named_parameters():
            theirs = dict(expected.named_parameters())[name].grad
            assert torch.equal(parameter.grad.full_tensor(), theirs), name
    finally:
        dist.destroy_process_group()


@needs_torchao
def test_a_run_trains_in_float8(sources, tmp_path, monkeypatch):
    emulated = partial(base.convert_to_float8, emulate=True)
    monkeypatch.setattr(base, "convert_to_float8", emulated)
    losses = []
    monkeypatch.setattr(
        LightningModule, "log_dict", lambda self, metrics, **_: losses.append(metrics["train/loss"])
    )
    module = make_module()
    module.float8 = "tensorwise"
    make_trainer(tmp_path, 8).fit(module, make_data(sources))
    assert type(module.decoder.model.layers[0].mlp.up_proj).__name__ == "Float8Linear"
    assert losses[-1] < losses[0] - 0.1


def test_none_changes_nothing():
    decoder = Decoder(DecoderConfig(37, 32, 1, 4, 2, 48))
    assert convert_to_float8(decoder, "none", CPU) == (0, 0)
    assert type(decoder.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_what_cannot_run_is_one_line(monkeypatch):
    decoder = Decoder(DecoderConfig(37, 32, 1, 4, 2, 48))

    def message(recipe="tensorwise", device="cpu", **options):
        with pytest.raises(UserError) as error:
            convert_to_float8(decoder, recipe, torch.device(device), **options)
        return str(error.value)

    assert message("rowise") == (
        "float8 'rowise' is unknown; expected one of none, tensorwise, rowwise, "
        "rowwise_with_gw_hp. Did you mean 'rowwise'?"
    )
    assert message() == (
        "float8 'tensorwise' needs a GPU of compute capability 8.9 or newer (Ada, Hopper), the "
        "model is on cpu; use float8 none."
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert message(device="cuda:0") == (
        "float8 'tensorwise' needs a GPU of compute capability 8.9 or newer (Ada, Hopper), NVIDIA "
        "A100-SXM4-80GB has 8.0; use float8 none."
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert message(device="cuda:0") == (
        "float8 'tensorwise' needs the package torchao, which is not installed; "
        "type pip install 'smol-lightning[gpu]' or use float8 none."
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    decoder = Decoder(DecoderConfig(37, 36, 1, 2, 1, 40))
    assert message(emulate=True) == (
        "float8 'tensorwise' fits none of the 7 linear layers; expected widths that are multiples "
        "of 16, hidden_size is 36 and intermediate_size 40; change them or use float8 none."
    )


def test_tokens_that_no_product_can_sum_over_are_one_line():
    check_tokens(4096)
    with pytest.raises(UserError) as error:
        check_tokens(4100)
    assert str(error.value) == (
        "a micro-batch has 4100 tokens, which float8 cannot multiply; expected a multiple of 16: "
        "change data.context_length or use model.float8 none."
    )
