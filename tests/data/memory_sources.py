"""Sources that live in memory: every token tells where it stands."""

import numpy as np

from smol.data.curriculum import Curriculum
from smol.data.loader import Layout, PositionLoader
from smol.data.spans import SourceOrder
from smol.data.stages import plan

EOS = 0


class MemoryStream:
    """Tokens ``(source * 100 + chunk) * 100_000 + position + 1``, an EOS here and there."""

    def __init__(self, source: int, chunk_tokens: list[int]):
        self.chunks = []
        for chunk, n in enumerate(chunk_tokens):
            tokens = (source * 100 + chunk) * 100_000 + np.arange(n, dtype=np.int64) + 1
            tokens[7::23] = EOS
            self.chunks.append(tokens)

    def read(self, chunk: int, start: int, length: int) -> np.ndarray:
        return self.chunks[chunk][start : start + length]


def make_loader(
    stages,
    chunks,
    rank=0,
    ranks=1,
    micro=32,
    workers=0,
    context=16,
    batch=128,
    history=(),
    window=2,
) -> PositionLoader:
    """A loader over in-memory sources; ``chunks`` maps a source to the tokens of its chunks."""
    orders = {n: SourceOrder(n, c, 8, 32, window, seed=1) for n, c in chunks.items()}
    digests = dict.fromkeys(orders, "x")
    curriculum = Curriculum(plan(stages, digests, context, batch, history), orders, digests)
    streams = {n: MemoryStream(i, chunks[n]) for i, n in enumerate(sorted(chunks))}
    loader = PositionLoader(curriculum, streams, EOS, Layout(rank, ranks, micro), workers)
    if history:
        loader.seek(history[-1].stop)
    return loader


def step_ids(loaders: list[PositionLoader], n: int) -> list[tuple]:
    """Token ids of the next ``n`` optimiser steps, each step's rows sorted; all ranks together."""
    iterators = [iter(loader) for loader in loaders]
    steps = []
    for _ in range(n):
        rows: list[tuple] = []
        for iterator in iterators:
            micro, accumulation = 0, 1
            while micro < accumulation:
                batch = next(iterator)
                assert batch.micro == micro
                accumulation, micro = batch.accumulation, micro + 1
                blocks = np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)
                rows += [tuple(row) for row in blocks.tolist()]
        position = batch.next_position
        steps.append((position, tuple(sorted(rows))))
        for loader in loaders:
            loader.consume(position)
    for iterator in iterators:
        iterator.close()
    return steps
