"""Bits per byte: a likelihood that does not depend on the tokenizer."""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from smol.data.batch import IGNORE
from smol.data.tokenizer import Tokenizer

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # what a byte-fallback tokenizer calls a single byte


def token_bytes(tokenizer: Tokenizer) -> Tensor:
    """UTF-8 bytes each token adds to a text; 0 for special tokens. Shape ``(vocab,)``, int64.

    Of a tokenizer that puts a blank before a text, that blank is counted as well.
    """
    backend = tokenizer.backend
    added = backend.get_added_tokens_decoder()
    decoder = repr(backend.decoder)
    byte_level, byte_fallback = "ByteLevel" in decoder, "ByteFallback" in decoder
    sizes = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    pieces: list[int] = []
    for piece, i in backend.get_vocab(with_added_tokens=True).items():
        if i in added:
            sizes[i] = 0 if added[i].special else len(added[i].content.encode())
        elif byte_level:
            sizes[i] = len(piece)  # the byte-level alphabet writes each byte as one character
        elif byte_fallback and BYTE.fullmatch(piece):
            sizes[i] = 1
        else:
            pieces.append(i)
    if pieces:  # decoders treat the ends of a text in their own ways: ask within one
        end = pieces[0]
        texts = backend.decode_batch([[end, end], *([end, i, end] for i in pieces)])
        empty, *lengths = (len(text.encode()) for text in texts)
        sizes[pieces] = torch.tensor(lengths) - empty
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
