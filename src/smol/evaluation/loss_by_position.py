"""Loss by source and by how much of its document the model has seen."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from smol.data.batch import IGNORE
from smol.data.tokenizer import Tokenizer
from smol.evaluation.bits_per_byte import token_bytes

BINS = 32  # powers of two, more than any context has


class LossByPosition(Metric):
    """Mean loss per source and per position, in bins [0, 1), [1, 2), [2, 4), … up to the context.

    The position of a target is that of the token it follows, counted from where its document begins
    *in its block*: it is the number of tokens of the document that are visible besides the first.
    A document that was cut at the edge of a block begins in mid-document there, and its positions
    count visible context, not the distance from its real beginning.

    Args:
        sources: Names that the source indices count.
        tokenizer: If given, special tokens do not count, as in
            :class:`~smol.evaluation.bits_per_byte.BitsPerByte`: they stand for no text.
    """

    full_state_update = False

    def __init__(self, sources: Sequence[str], tokenizer: Tokenizer | None = None):
        super().__init__()
        self.sources = tuple(sources)
        special = None if tokenizer is None else token_bytes(tokenizer) == 0
        self.register_buffer("special", special, persistent=False)
        # A position belongs to the bin that is the number of edges up to it.
        self.register_buffer("edges", 2 ** torch.arange(BINS - 1), persistent=False)
        shape = (len(self.sources), BINS)
        self.add_state("nats", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("context", torch.tensor(0), dist_reduce_fx="max")

    def update(self, nll: Tensor, targets: Tensor, positions: Tensor, sources: Tensor) -> None:
        """Count a batch.

        Args:
            nll: Negative log-likelihood of each target in nats, ``(rows, time)``.
            targets: ``(rows, time)`` int64; ``IGNORE`` is not counted.
            positions: Place of the token before each target in its document, ``(rows, time)``
                int64.
            sources: Source of each row, ``(rows,)`` int64.
        """
        counted = targets != IGNORE
        if self.special is not None:
            counted &= ~self.special[targets.clamp_min(0)]
        bins = torch.bucketize(positions, self.edges, right=True)
        cells = (sources[:, None] * BINS + bins).flatten()
        nats = nll.double().where(counted, 0.0).flatten()
        self.nats.view(-1).index_add_(0, cells, nats)
        self.tokens.view(-1).index_add_(0, cells, counted.long().flatten())
        longest = (positions.max() + 1).clamp_min(targets.shape[1])
        self.context = torch.maximum(self.context, longest)

    def compute(self) -> dict[str, Any]:
        """What was counted, as JSON can hold it.

        Returns:
            ``context``, tokens in the longest row; ``edges`` of the bins, one more than there are
            bins; ``all`` and, by name, ``sources`` that have tokens: each with ``loss`` in nats per
            token, ``tokens``, and both again ``by_position``, lists over the bins in which the loss
            of a bin without tokens is ``None``.
        """
        context = int(self.context)
        edges = [0, *(edge for edge in self.edges.tolist() if edge < context), context]
        nats, tokens = (x[:, : len(edges) - 1].cpu() for x in (self.nats, self.tokens))
        rows = zip(self.sources, nats, tokens, strict=True)
        return {
            "context": context,
            "edges": edges,
            "all": _summary(nats.sum(0), tokens.sum(0)),
            "sources": {name: _summary(n, t) for name, n, t in rows if t.any()},
        }


def _summary(nats: Tensor, tokens: Tensor) -> dict[str, Any]:
    counts = tokens.tolist()
    losses = [n / t if t else None for n, t in zip(nats.tolist(), counts, strict=True)]
    return {
        "loss": float(nats.sum()) / max(1, sum(counts)),
        "tokens": sum(counts),
        "by_position": {"loss": losses, "tokens": counts},
    }
