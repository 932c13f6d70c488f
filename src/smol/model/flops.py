"""Parameters and floating-point operations of a decoder, by formula.

One multiplication and one addition count as two operations; the backward pass costs twice the
forward, so training costs three times what inference does. Norms, activations and the embedding
look-up are left out, as in PaLM's appendix B (https://arxiv.org/abs/2204.02311).
"""

from collections.abc import Sequence

from smol.model.config import DecoderConfig


def num_parameters(config: DecoderConfig) -> int:
    """Number of parameters, counting a tied embedding once."""
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    bias = {
        "none": 0,
        "qkv": q_size + 2 * kv_size,
        "all": q_size + 2 * kv_size + config.hidden_size,
    }
    norms = 2 * config.hidden_size + 2 * config.head_dim * config.qk_norm
    layer = _layer_matmul_parameters(config) + bias[config.attention_bias] + norms
    embeddings = (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size
    return embeddings + config.num_layers * layer + config.hidden_size


def num_matmul_parameters(config: DecoderConfig) -> int:
    """Number of weights that multiply every token: all projections, and the head once."""
    layers = config.num_layers * _layer_matmul_parameters(config)
    return layers + config.vocab_size * config.hidden_size


def _layer_matmul_parameters(config: DecoderConfig) -> int:
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return config.hidden_size * (2 * q_size + 2 * kv_size + 3 * config.intermediate_size)


def flops_per_token(config: DecoderConfig, context: float) -> float:
    """Training operations per token by PaLM's convention: attention over the whole context.

    Args:
        config: Shape of the decoder.
        context: Tokens per sequence.

    Returns:
        ``6 N + 12 L H Q T``: N weights that multiply, L layers, H heads of width Q, T tokens.
    """
    return 6.0 * num_matmul_parameters(config) + _attention_flops(config, context)


def flops_per_token_causal(config: DecoderConfig, context: int) -> float:
    """Training operations per token, where a token attends to itself and what is before it.

    Args:
        config: Shape of the decoder.
        context: Tokens per sequence.

    Returns:
        As :func:`flops_per_token`, with the mean number of tokens attended to, ``(T + 1) / 2``.
    """
    return flops_per_token_packed(config, [context])


def flops_per_token_packed(config: DecoderConfig, lengths: Sequence[int]) -> float:
    """Training operations per token over documents that do not see each other.

    Args:
        config: Shape of the decoder.
        lengths: Of the documents, in tokens.

    Returns:
        Operations of all documents, ``sum(length * (length + 1) / 2)`` pairs of tokens, divided by
        the number of tokens.
    """
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    attended = pairs / sum(lengths)
    return 6.0 * num_matmul_parameters(config) + _attention_flops(config, attended)


def _attention_flops(config: DecoderConfig, attended: float) -> float:
    """Operations for scores and weighted values of one token over ``attended`` tokens."""
    return 12.0 * config.num_layers * config.num_heads * config.head_dim * attended
