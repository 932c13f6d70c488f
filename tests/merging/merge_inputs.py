"""Models that are merged in tests: their weights are a hash of model, tensor and index.

So they are the same on every machine and with every version of every library. mergekit's own
environment, in which ``make_golden.py`` runs, imports this file too.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

LAYERS, HIDDEN, HEADS, KV_HEADS, MLP, VOCAB = 4, 16, 2, 1, 24, 40
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": MLP,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = ("base", "one", "two", "three")


def noise(name: str, size: int) -> np.ndarray:
    """Uniform numbers from -0.5 to 0.5, ``(size,)``, float64: splitmix64 of their index."""
    x = np.arange(size, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 32)
    x = x * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53 - 0.5


def shapes(tied: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes by name of a small Llama."""
    width = HIDDEN // HEADS
    found = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        found |= {f"{layer}.{x}_layernorm.weight": (HIDDEN,) for x in ("input", "post_attention")}
        found |= {f"{layer}.self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qo"}
        kv = (KV_HEADS * width, HIDDEN)
        found |= {f"{layer}.self_attn.{x}_proj.weight": kv for x in "kv"}
        found |= {f"{layer}.mlp.{x}_proj.weight": (MLP, HIDDEN) for x in ("gate", "up")}
        found[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, MLP)
    found["model.norm.weight"] = (HIDDEN,)
    return found if tied else found | {"lm_head.weight": (VOCAB, HIDDEN)}


def base_weights(tied: bool = False) -> dict[str, torch.Tensor]:
    """The weights of the model ``base``, float32."""
    return {
        name: torch.from_numpy(noise(name, int(np.prod(shape)))).view(shape).float() * 0.2
        for name, shape in shapes(tied).items()
    }


def tuned(name: str, tensor: torch.Tensor, model: str) -> torch.Tensor:
    """A tensor of the base as a fine-tuned model has it: a common and an own change."""
    if model == "base":
        return tensor
    size = tensor.numel()
    change = 0.05 * noise(f"common/{name}", size) + 0.03 * noise(f"{model}/{name}", size)
    return (tensor.double() + torch.from_numpy(change).view_as(tensor)).float()


def write_models(
    folder: Path, tied: bool = False, dtype: torch.dtype = torch.float32, **config
) -> dict[str, dict[str, torch.Tensor]]:
    """Write all models as Hugging Face folders into ``folder``; returns their weights."""
    written = {}
    for model in MODELS:
        weights = {k: tuned(k, v, model).to(dtype) for k, v in base_weights(tied).items()}
        (folder / model).mkdir(parents=True)
        save_file(weights, folder / model / "model.safetensors", metadata={"format": "pt"})
        text = json.dumps(CONFIG | {"tie_word_embeddings": tied} | config)
        (folder / model / "config.json").write_text(text)
        written[model] = weights
    return written


def signature(tensor: torch.Tensor) -> list[float]:
    """Two projections of a tensor on fixed directions; a changed entry changes both."""
    values = tensor.double().flatten().numpy()
    return [float(f"{values @ noise(f'direction {i}', values.size):.8g}") for i in range(2)]
