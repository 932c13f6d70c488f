"""What a decoder is made of, as plain dataclasses that a YAML file fills in."""

from dataclasses import dataclass
from typing import Literal

from smol.errors import UserError


@dataclass
class DecoderConfig:
    """Shape and features of a decoder-only transformer (Llama, SmolLM2, SmolLM3, Qwen2, Qwen3).

    Raises:
        UserError: If the fields contradict each other.
    """

    vocab_size: int
    """Rows of the embedding, and of the head."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Number of transformer blocks."""
    num_heads: int
    """Query heads per layer."""
    num_kv_heads: int
    """Key and value heads per layer; fewer than ``num_heads`` is grouped-query attention."""
    intermediate_size: int
    """Width inside the SwiGLU feed-forward network."""
    head_dim: int | None = None
    """Width of one head; ``null`` means ``hidden_size // num_heads``."""
    nope: int | list[int] | None = None
    """Layers without rotary embedding: an interval n (every n-th layer) or a list of indices."""
    qk_norm: bool = False
    """Normalise each query and key head (Qwen3)."""
    attention_bias: Literal["none", "qkv", "all"] = "none"
    """Which attention projections have a bias: none, q, k and v (Qwen2), or o as well."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the head."""
    norm_eps: float = 1e-6
    """Added to the mean square inside RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    dropout: float = 0.0
    """Probability of dropping an activation where a block adds to the residual stream."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model {name} is {getattr(self, name)}; it must be at least 1.")
        if self.intermediate_size < 1:
            raise UserError(
                f"model intermediate_size is {self.intermediate_size}; it must be at least 1."
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise UserError(
                    f"model hidden_size {self.hidden_size} is not a multiple of num_heads "
                    f"{self.num_heads}; change one of them or set head_dim."
                )
            self.head_dim = self.hidden_size // self.num_heads
        if self.head_dim < 2 or self.head_dim % 2:
            raise UserError(
                f"model head_dim is {self.head_dim}; rotary embedding needs a positive even number."
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}; each key head serves an equal group of query heads."
            )
        if self.attention_bias not in ("none", "qkv", "all"):
            raise UserError(
                f"model attention_bias is {self.attention_bias!r}; expected none, qkv or all."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"model dropout is {self.dropout}; expected 0 <= dropout < 1.")
        if isinstance(self.nope, int) and self.nope < 1:
            raise UserError(
                f"model nope is {self.nope}; expected an interval of at least 1, a list of layers "
                "or null."
            )
        strangers = [i for i in sorted(self.nope_layers) if not 0 <= i < self.num_layers]
        if strangers:
            raise UserError(
                f"model nope names layer {strangers[0]}, but layers go from 0 to "
                f"{self.num_layers - 1}."
            )

    @property
    def nope_layers(self) -> frozenset[int]:
        """Indices of the layers without rotary embedding."""
        if isinstance(self.nope, int):
            return frozenset(range(self.nope - 1, self.num_layers, self.nope))
        return frozenset(self.nope or ())


@dataclass
class RopeConfig:
    """Rotary position embedding (Su et al. 2021), optionally stretched by YaRN (Peng et al. 2023).

    Raises:
        UserError: If a number is out of range.
    """

    theta: float = 50_000.0
    """Base of the frequencies."""
    yarn_factor: float | None = None
    """How many times longer than ``original_context`` the context becomes; ``null``: no YaRN."""
    original_context: int | None = None
    """Context in tokens of the training before YaRN; ``null``: what the checkpoint says of itself.

    A checkpoint records it, so that ``yarn_factor`` alone stretches any of them.
    """
    beta_fast: float = 32.0
    """YaRN keeps dimensions that turn more often than this within the original context."""
    beta_slow: float = 1.0
    """YaRN interpolates dimensions that turn less often than this."""

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise UserError(f"rope theta is {self.theta}; it must be greater than 1.")
        if self.yarn_factor is not None and self.yarn_factor < 1:
            raise UserError(f"rope yarn_factor is {self.yarn_factor}; it must be at least 1.")
        if self.original_context is not None and self.original_context < 1:
            raise UserError(
                f"rope original_context is {self.original_context}; it must be at least 1."
            )
