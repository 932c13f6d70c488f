"""Batches of text that is never trained on."""

from collections.abc import Iterator

import numpy as np
import torch

from smol.data.batch import IGNORE, TokenBatch, token_tensors
from smol.data.loader import Layout
from smol.data.streams import TokenStream


class HeldOut:
    """Batches of held-out blocks in reading order, dealt to the ranks in turn.

    Every rank gets equally many, since sharded models act together: the last ones may hold no
    target. It is no ``DataLoader``, which Lightning would deal out to the ranks once more.
    """

    def __init__(
        self,
        streams: dict[int, TokenStream],
        eos_id: int,
        context: int,
        layout: Layout,
        limit: int | None,
    ):
        self.streams, self.eos_id, self.context, self.layout = streams, eos_id, context, layout
        blocks = [
            (source, chunk, start)
            for source, stream in streams.items()
            for chunk, start in _first_blocks(stream, context, limit)
        ]
        rows = max(1, layout.micro_batch_tokens // context)
        self.batches = [blocks[i : i + rows] for i in range(0, len(blocks), rows)]

    def __len__(self) -> int:
        return -(-len(self.batches) // self.layout.ranks)

    def __iter__(self) -> Iterator[TokenBatch]:
        return (self._batch(index) for index in range(len(self)))

    def _batch(self, index: int) -> TokenBatch:
        mine = index * self.layout.ranks + self.layout.rank
        padding = mine >= len(self.batches)
        blocks = self.batches[0 if padding else mine]
        read = [self.streams[s].read(chunk, start, self.context + 1) for s, chunk, start in blocks]
        batch = TokenBatch(
            **token_tensors(np.stack(read), self.eos_id),
            sources=torch.tensor([source for source, _, _ in blocks]),
            exact=not padding,
        )
        if padding:
            batch.targets.fill_(IGNORE)
        return batch


def _first_blocks(stream: TokenStream, context: int, limit: int | None) -> list[tuple[int, int]]:
    """Chunk and first token of the blocks of a stream, up to ``limit`` tokens."""
    blocks = [
        (chunk, start)
        for chunk, tokens in enumerate(stream.chunk_tokens)
        for start in range(0, tokens - context, context)
    ]
    return blocks if limit is None else blocks[: max(1, limit // context)]
