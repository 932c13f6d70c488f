"""The decoder: pre-norm blocks of grouped-query attention and SwiGLU.

Parameter names are those of Llama and SmolLM3 in Hugging Face transformers, so that importing and
exporting weights are copies.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from smol.model.activation_checkpointing import (
    ActivationCheckpointing,
    check_mode,
    run_checkpointed,
)
from smol.model.attention import Attend, build_attention, document_positions
from smol.model.config import DecoderConfig, RopeConfig
from smol.model.rope import RotaryEmbedding, Rotation, rotate

Head = Callable[[Tensor, Tensor], Any]
"""Called with hidden states ``(batch, time, hidden)`` and the head's weight ``(vocab, hidden)``.

Tensor-parallel ranks each have some rows of the weight. A function, or a ``functools.partial`` of
one, with a true attribute ``takes_sharded_weight`` is given them as a ``DTensor``; others get all.
"""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product with ``x`` runs here: autocast's, or that of ``x``."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang & Sennrich 2019), computed in float32.

    Args:
        size: Length of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the result has the dtype that products will use.

        Under autocast that spares each of the projections that follow its own cast.
        """
        normed = F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)
        return normed.to(compute_dtype(x))


class Attention(nn.Module):
    """Projections around an attention backend: grouped queries, optional norms and biases."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        bias = config.attention_bias != "none"
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_bias == "all")
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        # The number of heads is left to the tensor: under tensor parallelism it is a share.
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return self.o_proj(attend(q, k, v).flatten(-2))


class MLP(nn.Module):
    """SwiGLU feed-forward network (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention, then the feed-forward network, each added to the residual stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = config.dropout
        self.activation_checkpointing: ActivationCheckpointing = "none"

    def forward(self, hidden: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """Transform hidden states.

        Args:
            hidden: ``(batch, time, hidden)``.
            rotation: Of the positions, or ``None`` in a layer without rotary embedding.
            attend: The attention of this batch.

        Returns:
            ``(batch, time, hidden)``.
        """
        # In here, so that the hooks and the compiler of a block see one call of it.
        return run_checkpointed(
            self._transform,
            (hidden, rotation, attend),
            mode=self.activation_checkpointing,
            random=self.dropout > 0,
        )

    def _transform(self, hidden: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        mixed = self.self_attn(self.input_layernorm(hidden), rotation, attend)
        hidden = hidden + self._drop(mixed)
        return hidden + self._drop(self.mlp(self.post_attention_layernorm(hidden)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Backbone(nn.Module):
    """Embedding, blocks and final norm; holds what the names begin with ``model.`` for."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Decoder(nn.Module):
    """A decoder-only transformer. Weights are torch's defaults until ``init_weights`` is called.

    Args:
        config: Shape and features.
        rope: Rotary embedding; ``None`` means the defaults of :class:`RopeConfig`.
        attention: Name of the attention backend.
        activation_checkpointing: What blocks compute again in the backward pass: nothing
            (``none``), all but matrix products and attention (``selective``), or all (``full``).

    Raises:
        UserError: If the attention backend or the kind of checkpointing is unknown, or if the
            backend cannot run here.
    """

    def __init__(
        self,
        config: DecoderConfig,
        rope: RopeConfig | None = None,
        attention: str = "sdpa",
        activation_checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        check_mode(activation_checkpointing)
        super().__init__()
        self.config = config
        self.attention = build_attention(attention)
        self.rotary = RotaryEmbedding(config.head_dim, rope or RopeConfig())
        self.model = Backbone(config)
        for layer in self.model.layers:
            layer.activation_checkpointing = activation_checkpointing
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        head: Head | None = None,
        attends: Sequence[Attend] | None = None,
    ) -> Any:
        """Run the decoder and apply ``head`` to the hidden states.

        The head is called in here because its weight may be sharded: only inside the forward pass
        of the decoder is it sure to be whole. It should return tensors, or tuples, lists or
        dictionaries of them, which the hooks of FSDP2 can see through.

        Args:
            tokens: ``(batch, time)``, int64.
            positions: ``(batch, time)``, integer; ``None`` counts from 0 in each document.
            documents: ``(batch, time)``, integer. Equal neighbours in a row are one document, and
                no token attends to another document; ``None`` makes each row one document.
            head: Called with the final hidden states ``(batch, time, hidden)`` and the weight of
                the head ``(vocab, hidden)``; ``None`` computes logits.
            attends: The attention of each layer, such as one that remembers earlier tokens; then
                ``positions`` is needed. ``None`` asks the attention backend for one of all layers.

        Returns:
            What ``head`` returns; by default logits ``(batch, time, vocab)``.
        """
        if attends is None:
            attend = self.attention.prepare(documents, tuple(tokens.shape), tokens.device)
            attends = [attend] * len(self.model.layers)
        if positions is None and documents is not None:
            positions = document_positions(documents)
        elif positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)

        hidden = self.model.embed_tokens(tokens)
        rotation = self.rotary(positions, compute_dtype(hidden))
        nope = self.config.nope_layers
        for index, (layer, attend) in enumerate(zip(self.model.layers, attends, strict=True)):
            hidden = layer(hidden, None if index in nope else rotation, attend)
        hidden = self.model.norm(hidden)
        head = head or F.linear
        weight = self.head_weight
        takes_shards = getattr(getattr(head, "func", head), "takes_sharded_weight", False)
        if isinstance(weight, DTensor) and not takes_shards:
            weight = weight.full_tensor()
        return head(hidden, weight)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the head, ``(vocab, hidden)``; whole only inside :meth:`forward`."""
        module = self.model.embed_tokens if self.config.tie_embeddings else self.lm_head
        return module.weight

    @property
    def rope(self) -> RopeConfig:
        """The rotary embedding in use."""
        return self.rotary.rope

    def set_rope_theta(self, theta: float) -> None:
        """Change the base of the rotary embedding, from the next forward on."""
        self.rotary.rope = replace(self.rope, theta=theta)
        self.rotary.reset()  # even if theta is the same: the buffer may have been put back
