"""Bits per byte: a likelihood that does not depend on the tokenizer."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from smol.data.batch import IGNORE
from smol.data.tokenizer import Tokenizer


def token_bytes(tokenizer: Tokenizer) -> Tensor:
    """UTF-8 bytes each token adds to a text; 0 for special tokens. Shape ``(vocab,)``, int64."""
    backend = tokenizer.backend
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    added = {i: t.content for i, t in backend.get_added_tokens_decoder().items()}
    byte_level = "ByteLevel" in repr(backend.decoder)
    sizes = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    for piece, i in backend.get_vocab(with_added_tokens=True).items():
        if i in special:
            continue
        if i in added:
            sizes[i] = len(added[i].encode())
        elif byte_level:
            sizes[i] = len(piece)  # the byte-level alphabet writes each byte as one character
        else:
            sizes[i] = len(backend.decode([i]).encode())
    return sizes


class BitsPerByte(Metric):
    """Total bits over total bytes of text, per source and over all sources.

    Special tokens stand for no text; neither their bits nor their bytes count.

    Args:
        sources: Names that the source indices count.
        tokenizer: Says how many bytes each token stands for.
    """

    full_state_update = False

    def __init__(self, sources: Sequence[str], tokenizer: Tokenizer):
        super().__init__()
        self.sources = tuple(sources)
        self.register_buffer("token_bytes", token_bytes(tokenizer), persistent=False)
        for name in ("nats", "bytes", "tokens"):
            zeros = torch.zeros(len(self.sources), dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, nll: Tensor, targets: Tensor, sources: Tensor) -> None:
        """Count a batch.

        Args:
            nll: Negative log-likelihood of each target in nats, ``(rows, time)``.
            targets: ``(rows, time)`` int64; ``IGNORE`` is not counted.
            sources: Source of each row, ``(rows,)`` int64.
        """
        sizes = self.token_bytes[targets.clamp_min(0)] * (targets != IGNORE)
        text = sizes > 0
        self.nats.index_add_(0, sources, (nll.double() * text).sum(1))
        self.bytes.index_add_(0, sources, sizes.sum(1).double())
        self.tokens.index_add_(0, sources, text.sum(1).double())

    def compute(self) -> dict[str, Tensor]:
        """``bits_per_byte``, ``loss`` (nats per token) and ``bits_per_byte/<source>``."""
        bits = self.nats / math.log(2)
        result = {
            "bits_per_byte": bits.sum() / self.bytes.sum(),
            "loss": self.nats.sum() / self.tokens.sum(),
        }
        for i, name in enumerate(self.sources):
            if self.bytes[i] > 0:
                result[f"bits_per_byte/{name}"] = bits[i] / self.bytes[i]
        return result
