"""Counts by formula against counts by looking."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from smol.model import Decoder, DecoderConfig, num_parameters
from smol.model.flops import (
    flops_per_token,
    flops_per_token_causal,
    flops_per_token_packed,
    num_matmul_parameters,
)

SMOLLM3_3B = DecoderConfig(
    vocab_size=128_256,
    hidden_size=2048,
    num_layers=36,
    num_heads=16,
    num_kv_heads=4,
    intermediate_size=11_008,
    nope=4,
)


def test_smollm3_3b_has_its_published_size():
    assert num_parameters(SMOLLM3_3B) == 3_075_098_624


@pytest.mark.parametrize(
    "config",
    [
        SMOLLM3_3B,
        DecoderConfig(301, 48, 3, 4, 2, 80, head_dim=20, qk_norm=True, tie_embeddings=False),
        DecoderConfig(301, 48, 3, 4, 2, 80, attention_bias="qkv"),
        DecoderConfig(301, 48, 3, 4, 4, 80, attention_bias="all"),
    ],
)
def test_parameters_equal_those_of_a_decoder(config):
    with torch.device("meta"):
        decoder = Decoder(config)
    assert num_parameters(config) == sum(p.numel() for p in decoder.parameters())
    names = dict(decoder.named_parameters())
    matrices = sum(p.numel() for name, p in names.items() if p.ndim == 2)
    unread = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    assert num_matmul_parameters(config) == matrices - unread


def test_palm_flops_equal_what_torch_counts():
    config = DecoderConfig(301, 48, 3, 4, 4, 80, nope=2)
    decoder = Decoder(config)
    tokens = torch.randint(301, (2, 32))
    # As plain matrix products attention is counted in full, as PaLM does, whatever its mask.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        decoder(tokens)
    assert 3 * counter.get_total_flops() / tokens.numel() == flops_per_token(config, 32)


def test_attention_terms():
    config = DecoderConfig(301, 48, 3, 4, 2, 80, head_dim=20)
    base = 6 * num_matmul_parameters(config)
    pair = 12 * 3 * 4 * 20
    assert flops_per_token(config, 100) == base + pair * 100
    assert flops_per_token_causal(config, 100) == base + pair * 50.5
    visible = sum(i + 1 for length in (70, 20, 10) for i in range(length))
    packed = flops_per_token_packed(config, [70, 20, 10])
    assert packed == pytest.approx(base + pair * visible / 100)
    assert packed < flops_per_token_causal(config, 100) < flops_per_token(config, 100)
