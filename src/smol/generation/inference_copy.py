"""A copy of a decoder in the layout that a processor multiplies fastest."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from smol.errors import UserError
from smol.model.attention import Attend
from smol.model.decoder import Block, Decoder, RMSNorm
from smol.model.io import assemble_decoder
from smol.model.rope import Rotation, rotate

FAST_ROWS = 4
"""One row is multiplied as so many: the kernel that oneDNN takes for them reads weights faster."""
USUAL_ROWS = 16
"""The blocks of a packed weight are chosen for products with so many rows."""

Packed = tuple[Tensor, Tensor | None]
"""A packed weight and the bias, ``(out,)``."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, for plain weights and for packed ones.

    Args:
        x: ``(..., in)``.
        weight: ``(out, in)``.
        bias: ``(out,)``.

    Returns:
        ``(..., out)``.
    """
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    multiply = torch.ops.mkldnn._linear_pointwise
    if x.numel() > x.shape[-1]:
        return multiply(x, weight, bias, "none", [], "")
    return multiply(x.expand(FAST_ROWS, *x.shape[1:]), weight, bias, "none", [], "")[:1]


def pack(*layers: nn.Linear) -> Packed:
    """Linear layers with the same input as one, its weight in the blocks of oneDNN.

    A plain weight in bfloat16 is put into blocks at each call, which takes longer than the product
    with a few tokens; one in float32 is read as it lies, which is slower than block by block.

    Args:
        layers: Their outputs are put side by side.
    """
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, USUAL_ROWS)
    return packed, torch.cat(biases) if biases else None


def normalize(x: Tensor, norm: RMSNorm) -> Tensor:
    """A norm without the changes of dtype that training needs."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


class PackedBlock(nn.Module):
    """:class:`smol.model.decoder.Block` with four products instead of seven.

    With one row a layer takes no longer than its weights take to be read, if little else is done;
    hence no modules in here, and one rotation for queries and keys.

    Args:
        plain: The block to take over.
    """

    def __init__(self, plain: Block) -> None:
        super().__init__()
        attention, mlp = plain.self_attn, plain.mlp
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        self.head_dim = attention.head_dim
        self.heads = [layer.out_features // self.head_dim for layer in projections]
        self.qkv, self.o = pack(*projections), pack(attention.o_proj)
        self.gate_up, self.down = pack(mlp.gate_proj, mlp.up_proj), pack(mlp.down_proj)
        self.norms = plain.input_layernorm, plain.post_attention_layernorm
        self.qk_norms = attention.q_norm, attention.k_norm

    def forward(self, hidden: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        before_attention, before_mlp = self.norms
        mixed = self._attention(normalize(hidden, before_attention), rotation, attend)
        hidden = hidden + mixed
        gate, up = linear(normalize(hidden, before_mlp), *self.gate_up).chunk(2, dim=-1)
        return hidden + linear(F.silu(gate).mul_(up), *self.down)

    def _attention(self, x: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        heads = linear(x, *self.qkv).unflatten(-1, (-1, self.head_dim))
        q_norm, k_norm = self.qk_norms
        q_heads, k_heads, v_heads = self.heads
        qk, v = heads.split_with_sizes((q_heads + k_heads, v_heads), dim=-2)
        if q_norm is not None:
            q, k = qk.split_with_sizes((q_heads, k_heads), dim=-2)
            qk = torch.cat((normalize(q, q_norm), normalize(k, k_norm)), dim=-2)
        if rotation is not None:
            qk = rotate(qk, rotation)
        q, k = qk.split_with_sizes((q_heads, k_heads), dim=-2)
        return linear(attend(q, k, v).flatten(-2), *self.o)


class PackedHead(nn.Module):
    """The head, whose weight the decoder hands to a function such as :func:`linear`."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.weight, _ = pack(plain)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of a dtype can be packed: on processors, in bfloat16 on most newer ones."""
    operators = torch.ops.mkldnn
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(operators, "_reorder_linear_weight")
        and (dtype == torch.float32 or operators._is_mkldnn_bf16_supported())
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
    for index, block in enumerate(copy.model.layers):
        copy.model.layers[index] = PackedBlock(block)
    copy.lm_head = PackedHead(copy.lm_head)
    return copy
