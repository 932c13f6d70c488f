"""A copy of a decoder in the layout that a processor multiplies fastest."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from smol.errors import UserError
from smol.model.attention import Attend
from smol.model.decoder import MLP, Attention, Decoder
from smol.model.io import assemble_decoder
from smol.model.rope import Rotation, rotate


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, for plain weights and for packed ones.

    Args:
        x: ``(..., in)``.
        weight: ``(out, in)``.
        bias: ``(out,)``.

    Returns:
        ``(..., out)``.
    """
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class PackedLinear(nn.Module):
    """Linear layers with the same input as one product, its weight in the blocks of oneDNN.

    A plain weight in bfloat16 is put into blocks at each call, which takes longer than the product
    with a few tokens.

    Args:
        layers: The layers to take over; their outputs are put side by side.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        has_bias = layers[0].bias is not None
        self.bias = torch.cat([layer.bias.detach() for layer in layers]) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class PackedAttention(nn.Module):
    """:class:`smol.model.decoder.Attention` with two products instead of four."""

    def __init__(self, plain: Attention) -> None:
        super().__init__()
        projections = plain.q_proj, plain.k_proj, plain.v_proj
        self.head_dim = plain.head_dim
        self.heads = [layer.out_features // plain.head_dim for layer in projections]
        self.qkv_proj, self.o_proj = PackedLinear(*projections), PackedLinear(plain.o_proj)
        self.q_norm, self.k_norm = plain.q_norm, plain.k_norm

    def forward(self, x: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        q, k, v = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=-2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return self.o_proj(attend(q, k, v).flatten(-2))


class PackedMLP(nn.Module):
    """:class:`smol.model.decoder.MLP` with two products instead of three."""

    def __init__(self, plain: MLP) -> None:
        super().__init__()
        self.gate_up_proj = PackedLinear(plain.gate_proj, plain.up_proj)
        self.down_proj = PackedLinear(plain.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of a dtype can be packed on a device: bfloat16 on most newer processors."""
    operators = torch.ops.mkldnn
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(operators, "_reorder_linear_weight")
        and operators._is_mkldnn_bf16_supported()
    )


def inference_copy(decoder: Decoder, dtype: torch.dtype) -> Decoder:
    """Copy a decoder for inference; later changes of its weights do not reach the copy.

    Args:
        decoder: Whole, not sharded.
        dtype: Of the copy. Where the processor can (:func:`can_pack`), its weights are packed.

    Raises:
        UserError: If the decoder is sharded.
    """
    weights = decoder.state_dict()
    if any(isinstance(weight, DTensor) for weight in weights.values()):
        raise UserError("a sharded decoder cannot be copied for inference; expected dtype null.")
    weights = {name: weight.to(dtype, copy=True) for name, weight in weights.items()}
    config, device = decoder.config, decoder.head_weight.device
    if not can_pack(dtype, device):
        return assemble_decoder(config, decoder.rope, weights, device).eval()
    if config.tie_embeddings:  # rows are looked up in a plain matrix and multiplied with a packed
        config = replace(config, tie_embeddings=False)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    copy = assemble_decoder(config, decoder.rope, weights, device).eval()
    for layer in copy.model.layers:
        layer.self_attn, layer.mlp = PackedAttention(layer.self_attn), PackedMLP(layer.mlp)
    copy.lm_head = PackedLinear(copy.lm_head)
    return copy
