"""Initial weights: what they are, and what the check sees."""

import pytest
import torch

from smol.errors import UserError
from smol.model import Decoder, DecoderConfig, check_initialization, init_weights
from smol.model.rope import inverse_frequencies

CONFIG = DecoderConfig(
    211, 64, 2, 4, 2, 96, qk_norm=True, attention_bias="all", tie_embeddings=False, init_std=0.05
)


def fresh(seed: int = 0) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(CONFIG)
    decoder.to_empty(device="cpu")
    for parameter in decoder.parameters():
        parameter.data.fill_(torch.nan)
    init_weights(decoder, seed=seed)
    return decoder


def test_every_parameter_and_buffer_is_filled():
    decoder = fresh()
    check_initialization(decoder)
    for name, parameter in decoder.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.1), name
            assert abs(parameter.mean().item()) < 0.005, name
    assert torch.equal(decoder.rotary.inv_freq, inverse_frequencies(16, decoder.rope))
    assert torch.isfinite(decoder(torch.arange(20).unsqueeze(0))).all()


def test_seed_decides_and_parameters_differ():
    first, again, other = fresh(0), fresh(0), fresh(1)
    weights = first.state_dict()
    for name, weight in weights.items():
        assert torch.equal(weight, again.state_dict()[name])
    assert not torch.equal(weights["lm_head.weight"], other.state_dict()["lm_head.weight"])
    layers = first.model.layers
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight)
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[0].mlp.gate_proj.weight)


def test_std_may_be_overridden():
    decoder = fresh()
    init_weights(decoder, std=0.01, seed=0)
    check_initialization(decoder, std=0.01)
    with pytest.raises(UserError, match=r"standard deviation 0\.01"):
        check_initialization(decoder)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", lambda p: p.view(-1)[7:8].fill_(torch.nan), "finite"),
        ("lm_head.weight", lambda p: p.view(-1)[7:8].fill_(torch.inf), "finite"),
        ("model.embed_tokens.weight", lambda p: p.zero_(), "all zero"),
        ("model.layers.0.self_attn.o_proj.weight", lambda p: p.mul_(1.3), "standard deviation"),
        ("model.layers.0.self_attn.q_proj.bias", lambda p: p.add_(1e-3), "start at zero"),
        ("model.norm.weight", lambda p: p.mul_(0.9), "start at one"),
        ("model.layers.0.self_attn.k_norm.weight", lambda p: p.zero_(), "start at one"),
    ],
)
@torch.no_grad()
def test_check_names_the_culprit(name, spoil, message):
    decoder = fresh()
    spoil(decoder.get_parameter(name))
    with pytest.raises(UserError, match=message) as caught:
        check_initialization(decoder)
    assert name in str(caught.value)


def test_meta_parameters_are_refused_in_one_line():
    with torch.device("meta"):
        decoder = Decoder(CONFIG)
    with pytest.raises(UserError, match="to_empty"):
        init_weights(decoder)
