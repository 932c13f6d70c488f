"""The ``config.json`` of Hugging Face models, from and to a decoder's description."""

from collections.abc import Mapping
from typing import Any

from smol.errors import UserError
from smol.model.config import DecoderConfig, RopeConfig

MODEL_TYPES = ("llama", "smollm3", "qwen2", "qwen3", "mistral")
DEFAULT_THETA = 10_000.0
"""Of these model types in transformers, where a config.json is silent; SmolLM3 has its own."""
SMOLLM3_THETA = 2_000_000.0
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("intermediate_size",)  # what no model can do without


def from_huggingface_config(config: Mapping[str, Any]) -> tuple[DecoderConfig, RopeConfig]:
    """Translate the content of a ``config.json``.

    Raises:
        UserError: If the model is of another kind or has a feature that ``Decoder`` has not.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(
            f"Hugging Face model type {kind!r} is not supported; "
            f"expected one of {', '.join(MODEL_TYPES)}."
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"activation {config['hidden_act']!r} is not supported; expected silu.")
    if config.get("mlp_bias"):
        raise UserError("mlp_bias is not supported; the feed-forward network has no biases here.")
    _refuse_sliding_window(config, kind)
    for key in SIZES:
        if isinstance(size := config.get(key), bool) or not isinstance(size, int) or size < 1:
            raise UserError(f"config.json says {key}: {size}; expected a positive whole number.")
    biases = "all" if config.get("attention_bias") else "none"
    decoder = DecoderConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        intermediate_size=config["intermediate_size"],
        # Qwen3 is the one whose heads have a fixed width where its config.json is silent.
        head_dim=config.get("head_dim") or (128 if kind == "qwen3" else None),
        nope=_nope_layers(config) if kind == "smollm3" else None,
        qk_norm=kind == "qwen3",
        attention_bias="qkv" if kind == "qwen2" else biases,
        tie_embeddings=config.get("tie_word_embeddings", kind == "smollm3"),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        init_std=config.get("initializer_range", 0.02),
    )
    return decoder, _rope_from(config, SMOLLM3_THETA if kind == "smollm3" else DEFAULT_THETA)


def _refuse_sliding_window(config: Mapping[str, Any], kind: str) -> None:
    if kind == "mistral":
        window = config.get("sliding_window", 4096)
    else:
        window = config.get("sliding_window") if config.get("use_sliding_window") else None
    if window or "sliding_attention" in (config.get("layer_types") or ()):
        raise UserError(
            f"this {kind} model attends within a sliding window (sliding_window {window}), "
            "which is not supported; set sliding_window to null to attend to everything."
        )


def _nope_layers(config: Mapping[str, Any]) -> list[int] | int:
    uses_rope = config.get("no_rope_layers")
    if uses_rope is None:
        return config.get("no_rope_layer_interval", 4)
    return [
        i for i, has_rope in enumerate(uses_rope[: config["num_hidden_layers"]]) if not has_rope
    ]


def _rope_from(config: Mapping[str, Any], default_theta: float) -> RopeConfig:
    # Transformers 5 writes one dictionary where version 4 wrote a scaling beside the base.
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or default_theta)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    known = {"rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings"}
    known |= {"beta_fast", "beta_slow"}
    strange = sorted(key for key in scaling.keys() - known if scaling[key] is not None)
    if kind not in ("default", "yarn") or strange:
        seen = f"{kind!r} with {', '.join(strange)}" if strange else repr(kind)
        raise UserError(f"rope scaling {seen} is not supported; expected default or plain yarn.")
    if kind == "default":
        return RopeConfig(theta=theta)
    return RopeConfig(
        theta=theta,
        yarn_factor=float(scaling["factor"]),
        original_context=int(
            scaling.get("original_max_position_embeddings") or config["max_position_embeddings"]
        ),
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
    )


def to_huggingface_config(
    decoder: DecoderConfig, rope: RopeConfig, context: int | None = None
) -> dict[str, Any]:
    """Describe a decoder by the ``config.json`` of the transformers class that equals it.

    Args:
        decoder: Shape and features.
        rope: Rotary embedding.
        context: Longest sequence in tokens; ``None`` means what YaRN stretches to, or 32,768.

    Raises:
        UserError: If no class of transformers has this combination of features.
    """
    kind, architecture = _architecture(decoder)
    if context is None:
        stretched = rope.yarn_factor and int(rope.yarn_factor * rope.original_context)
        context = stretched or 32_768
    config = {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_dim,
        "intermediate_size": decoder.intermediate_size,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": decoder.norm_eps,
        "initializer_range": decoder.init_std,
        "attention_bias": decoder.attention_bias != "none",
        "tie_word_embeddings": decoder.tie_embeddings,
        "use_cache": True,
        **_rope_to(rope),
        # Absent would mean the defaults of the class, which are ids of another vocabulary.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if kind == "smollm3":
        nope = decoder.nope_layers
        config["no_rope_layers"] = [int(i not in nope) for i in range(decoder.num_layers)]
    return config


def _architecture(decoder: DecoderConfig) -> tuple[str, str]:
    """Model type and class of transformers that have exactly these features."""
    features = (bool(decoder.nope_layers), decoder.qk_norm, decoder.attention_bias)
    match features:
        case (True, False, "none" | "all"):
            kind = "smollm3", "SmolLM3ForCausalLM"
        case (False, True, "none" | "all"):
            kind = "qwen3", "Qwen3ForCausalLM"
        case (False, False, "qkv"):
            kind = "qwen2", "Qwen2ForCausalLM"
        case (False, False, _):
            kind = "llama", "LlamaForCausalLM"
        case _:
            raise UserError(
                f"no class of transformers has nope {decoder.nope}, qk_norm {decoder.qk_norm} and "
                f"attention_bias {decoder.attention_bias} at once; this decoder cannot be exported."
            )
    if kind[0] == "llama" and decoder.hidden_size % decoder.num_heads:
        raise UserError(
            f"LlamaForCausalLM refuses hidden_size {decoder.hidden_size} with num_heads "
            f"{decoder.num_heads}, which do not divide; this decoder cannot be exported."
        )
    return kind


def _rope_to(rope: RopeConfig) -> dict[str, Any]:
    """Both spellings, so that transformers 4 and 5 and the servers built on them agree."""
    if rope.yarn_factor is None:
        parameters = {"rope_type": "default", "rope_theta": rope.theta}
        return {"rope_theta": rope.theta, "rope_parameters": parameters}
    scaling = {
        "rope_type": "yarn",
        "factor": rope.yarn_factor,
        "original_max_position_embeddings": rope.original_context,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
    }
    return {
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": {**scaling, "rope_theta": rope.theta},
    }
