"""A small decoder, a tokenizer of bytes, and text by brute force."""

import torch

from smol.model import Decoder, DecoderConfig, RopeConfig, init_weights

VOCAB = 61
DECODERS = {
    "plain": {},
    "nope": {"nope": 2},
    "gqa": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "attention_bias": "all"},
    "untied": {"tie_embeddings": False, "head_dim": 24, "attention_bias": "qkv"},
}
YARN = RopeConfig(theta=1e4, yarn_factor=4.0, original_context=16)


def make_decoder(kind: str = "nope", rope: RopeConfig | None = None, **changes) -> Decoder:
    """A decoder whose logits are far enough apart for greedy texts to agree."""
    shape = {"num_heads": 2, "num_kv_heads": 1} | DECODERS[kind] | changes
    config = DecoderConfig(VOCAB, 32, 2, intermediate_size=64, **shape)
    decoder = Decoder(config, rope or RopeConfig())
    init_weights(decoder, std=0.3, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith(("bias", "norm.weight")):  # so that they count
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return decoder.eval()


class ByteTokenizer:
    """Tokens are bytes; those above 30 make up characters of two bytes where they can."""

    alphabet = (*b"abcdefghijklmnopqrstuvwxyz ,.!", 0xC3, *range(0x80, 0x9E))

    def __init__(self, eos_id: int = VOCAB) -> None:
        self.eos_id = eos_id  # by default none

    def decode(self, ids) -> str:
        return bytes(self.alphabet[i] for i in ids).decode("utf-8", errors="replace")


@torch.no_grad()
def brute_force(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens, from the whole text again for each."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(decoder(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]
