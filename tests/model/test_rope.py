"""Rotary embedding against transformers' own."""

import pytest
import torch

from smol.errors import UserError
from smol.model import Decoder, DecoderConfig, RopeConfig
from smol.model.rope import RotaryEmbedding, inverse_frequencies, rotate


def transformers_rope(theta: float, head_dim: int, **yarn):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = "yarn" if yarn else "default"
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **yarn},
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 50_000.0, 1_500_000.0])
@pytest.mark.parametrize("yarn", [None, (2.0, 64), (4.0, 4096), (2.0, 32_768)])
def test_frequencies_and_scale_equal_transformers(head_dim, theta, yarn):
    factor, context = yarn or (None, None)
    rope = RopeConfig(theta=theta, yarn_factor=factor, original_context=context)
    options = {"factor": factor, "original_max_position_embeddings": context} if yarn else {}
    expected = transformers_rope(theta, head_dim, **options)
    torch.testing.assert_close(
        inverse_frequencies(head_dim, rope), expected.inv_freq, rtol=1e-6, atol=0
    )
    assert RotaryEmbedding(head_dim, rope).scale == pytest.approx(expected.attention_scaling)


def test_rotation_equals_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    positions = torch.randint(0, 100_000, (2, 7))
    q, k = torch.randn(2, 7, 4, 32), torch.randn(2, 7, 2, 32)
    yarn = {"factor": 2.0, "original_max_position_embeddings": 128}
    cos, sin = transformers_rope(7e4, 32, **yarn)(q, positions)
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    rotary = RotaryEmbedding(32, RopeConfig(theta=7e4, yarn_factor=2.0, original_context=128))
    rotation = rotary(positions, torch.float32)
    torch.testing.assert_close(rotate(q, rotation), expected_q)
    torch.testing.assert_close(rotate(k, rotation), expected_k)


def test_theta_changes_while_running():
    config = DecoderConfig(50, 32, 2, 2, 2, 32)
    rope = RopeConfig(theta=1e4)
    torch.manual_seed(0)
    decoder = Decoder(config, rope)
    torch.manual_seed(0)
    fresh = Decoder(config, RopeConfig(theta=5e5))
    tokens = torch.randint(50, (1, 30))
    before, buffer = decoder(tokens), decoder.rotary.inv_freq
    decoder.set_rope_theta(5e5)
    assert decoder.rotary.inv_freq is buffer
    assert torch.equal(decoder(tokens), fresh(tokens))
    assert not torch.equal(decoder(tokens), before)
    assert decoder.rope.theta == 5e5
    assert rope.theta == 1e4  # the caller's configuration is left alone


def test_frequencies_survive_moves_and_casts():
    with torch.device("meta"):
        rotary = RotaryEmbedding(16, RopeConfig())
    assert rotary.inv_freq.is_meta
    rotary.to_empty(device="cpu").bfloat16()
    assert torch.equal(rotary.inv_freq, inverse_frequencies(16, RopeConfig()))
    assert "inv_freq" not in rotary.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"theta": 0.0}, "theta is 0.0"),
        ({"original_context": 0}, "original_context is 0"),
        ({"yarn_factor": 0.5, "original_context": 10}, "yarn_factor is 0.5"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        RopeConfig(**options)


def test_yarn_needs_a_context_to_stretch():
    with pytest.raises(UserError, match="original_context is missing"):
        RotaryEmbedding(16, RopeConfig(yarn_factor=2.0))
