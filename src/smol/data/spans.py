"""In which order the tokens of one source are read, at any context length, each once an epoch.

A chunk of ``N`` tokens is ``(N - 1) // span`` *spans* of ``span`` tokens (the last token of each
block is only a target, so neighbouring blocks share one token). A *block* of context ``T`` is
``T / span`` neighbouring spans, aligned like a binary buddy allocator's: contexts are the span
times powers of two, up to the *longest* one, whose blocks are called superblocks.

The order is seeded per epoch. Chunks are permuted and taken in windows of a few, so that an object
store sees few chunks at a time; within a window the blocks of its chunks are interleaved at random,
and each chunk hands out its superblocks in random order, each of them block by block. A change of
context in mid-epoch keeps what was read: what is left of a superblock stays in the chunk as free
pieces, and a shorter context takes those first, smallest piece that fits (best fit).

Hence at most one free piece of each size below a superblock exists in a chunk at any time: a piece
is split only when none of the smaller sizes that fit exists, and the split leaves one of each. The
tail of a chunk starts out so, too. The free pieces of a chunk are then always shorter together than
one superblock: no more than one longest block per chunk is lost, whatever the contexts were.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np

from smol.errors import UserError


def shuffled(n: int, *key: int) -> np.ndarray:
    """A permutation of ``range(n)`` that depends on ``key`` alone, not on the numpy version.

    Raw bits of a bit generator are stable across numpy releases, its shuffles need not be.
    """
    return np.argsort(random_bits(n, *key), kind="stable")


def random_bits(n: int, *key: int) -> np.ndarray:
    """``n`` uniform uint64 numbers that depend on ``key`` alone."""
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    return np.asarray(bits, dtype=np.uint64)


@dataclass
class ChunkState:
    """What is left of one chunk in this epoch, in spans.

    Attributes:
        pieces: size to start of the free pieces smaller than a superblock; one at most per size.
        opened: how many superblocks (in this epoch's order) have been taken or split.
    """

    pieces: dict[int, int] = field(default_factory=dict)
    opened: int = 0


class _Chunk:
    """One chunk in one epoch: its order, and what any consumption leaves of it."""

    def __init__(self, spans: int, superblock: int, key: Sequence[int]):
        self.superblock = superblock
        self.full, self.tail = divmod(spans, superblock)
        self.order = shuffled(self.full, *key, 0)
        self.masks = random_bits(self.full + 1, *key, 1).astype(np.int64)

    def fresh(self) -> ChunkState:
        pieces, start, size = {}, self.full * self.superblock, self.superblock // 2
        while size:
            if self.tail & size:
                pieces[size] = start
                start += size
            size //= 2
        return ChunkState(pieces)

    def available(self, state: ChunkState, block: int) -> int:
        """How many blocks of ``block`` spans are left."""
        in_pieces = sum(size for size in state.pieces if size >= block)
        return (in_pieces + (self.full - state.opened) * self.superblock) // block

    def starts(self, state: ChunkState, block: int) -> np.ndarray:
        """First spans of all blocks left, in reading order. Shape ``(available,)``, int64."""
        parts = [
            self._walk(state.pieces[size], size, block)
            for size in sorted(state.pieces)
            if size >= block
        ]
        superblocks = self.order[state.opened :]
        per = self.superblock // block
        steps = np.arange(per) ^ ((self.masks[superblocks, None] // block) % per)
        parts.append((superblocks[:, None] * self.superblock + steps * block).ravel())
        return np.concatenate(parts)

    def after(self, state: ChunkState, block: int, consumed: int) -> ChunkState:
        """The state once ``consumed`` blocks of ``block`` spans were read from ``state``."""
        pieces = dict(state.pieces)
        for size in sorted(s for s in state.pieces if s >= block):
            if not consumed:
                return ChunkState(pieces, state.opened)
            taken = min(consumed, size // block)
            self._split(pieces, pieces.pop(size), size, block, taken)
            consumed -= taken
        whole, part = divmod(consumed, self.superblock // block)
        opened = state.opened + whole
        if part:
            start = int(self.order[opened]) * self.superblock
            self._split(pieces, start, self.superblock, block, part)
            opened += 1
        return ChunkState(pieces, opened)

    def _mask(self, start: int, size: int, block: int) -> int:
        return int(self.masks[start // self.superblock]) // block % (size // block)

    def _walk(self, start: int, size: int, block: int) -> np.ndarray:
        # Counting up under XOR with a fixed mask visits a block's buddy next, then the buddy of the
        # pair, and so on: random, and yet any prefix leaves one free piece per size.
        return start + (np.arange(size // block) ^ self._mask(start, size, block)) * block

    def _split(self, pieces: dict[int, int], start: int, size: int, block: int, taken: int) -> None:
        mask, i = self._mask(start, size, block), taken
        while i < size // block:
            run = i & -i  # the largest aligned run of blocks that begins at i
            pieces[run * block] = start + ((i ^ mask) & -run) * block
            i += run


class SourceOrder:
    """The reading order of one source.

    Args:
        name: The source's name; part of the seed, so that sources are ordered independently.
        chunk_tokens: Tokens in each chunk file.
        span: The shortest context, in tokens.
        longest: The longest context, in tokens: ``span`` times a power of two.
        window: How many chunks are read from at a time.
        seed: The data seed.
    """

    def __init__(
        self,
        name: str,
        chunk_tokens: Sequence[int],
        span: int,
        longest: int,
        window: int,
        seed: int,
    ):
        self.name, self.span, self.longest, self.window = name, span, longest, window
        self.key = (seed, crc32(name.encode()))
        self.chunk_tokens = np.asarray(chunk_tokens, dtype=np.int64)
        self.spans = np.maximum(self.chunk_tokens - 1, 0) // span
        self._tables: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def chunk(self, epoch: int, index: int) -> _Chunk:
        key = (*self.key, epoch, 1, int(index))
        return _Chunk(int(self.spans[index]), self.longest // self.span, key)

    def blocks_per_epoch(self, context: int) -> int:
        """Blocks of ``context`` tokens in one epoch.

        Raises:
            UserError: no chunk holds a block of that length.
        """
        total = int((self.spans // (context // self.span)).sum())
        if not total:
            longest = int(self.chunk_tokens.max(initial=0))
            raise UserError(
                f"source '{self.name}' holds no block of {context} tokens: its longest chunk has "
                f"{longest}; prepare it again with larger chunks (src/prepare.py --chunk_tokens)"
            )
        return total

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens in all whole spans."""
        return int(self.spans.sum()) * self.span

    def table(self, epoch: int, context: int) -> tuple[np.ndarray, np.ndarray]:
        """``(chunks, ends)``: the epoch's permutation of chunks, and the cumulated number of blocks
        at the end of each window. int64, shapes ``(chunks,)`` and ``(windows,)``."""
        if (epoch, context) not in self._tables:
            chunks = shuffled(len(self.spans), *self.key, epoch, 0)
            blocks = (self.spans // (context // self.span))[chunks]
            per_window = np.add.reduceat(blocks, np.arange(0, len(blocks), self.window))
            if len(self._tables) >= 4:
                self._tables.clear()
            self._tables[epoch, context] = chunks, np.cumsum(per_window)
        return self._tables[epoch, context]

    def window_chunks(self, epoch: int, window: int) -> np.ndarray:
        chunks, _ = self.table(epoch, self.span)
        return chunks[window * self.window : (window + 1) * self.window]


@dataclass(frozen=True)
class Place:
    """Where a source stands: an epoch, a window of it, and what is left of the window's chunks
    (``None``: all of it)."""

    epoch: int = 0
    window: int = 0
    states: tuple[ChunkState, ...] | None = None


class Leg:
    """A source read at one context length from some place on.

    Args:
        order: The source's order.
        context: Tokens per block.
        place: Where the leg begins.
    """

    def __init__(self, order: SourceOrder, context: int, place: Place | None = None):
        self.order, self.context = order, context
        self.place = place = place or Place()
        self.block = context // order.span
        self.per_epoch = order.blocks_per_epoch(context)
        _, ends = order.table(place.epoch, context)
        self._rest = int(ends[-1] - ends[place.window])  # blocks in the later windows of this epoch
        self._first = len(self._window(place.epoch, place.window)[0])
        self._cached: tuple[tuple[int, int], tuple[np.ndarray, np.ndarray]] | None = None

    def epoch(self, k: int) -> int:
        """The epoch that block ``k`` of this leg belongs to."""
        return self._locate(k)[0]

    def read(self, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Chunk index and first token of the blocks ``k``: an ascending run of integers.

        Returns:
            Two int64 arrays of ``k``'s shape.
        """
        chunks, starts = np.empty_like(k), np.empty_like(k)
        done = 0
        while done < len(k):
            epoch, window, offset = self._locate(int(k[done]))
            if self._cached is None or self._cached[0] != (epoch, window):
                self._cached = (epoch, window), self._window(epoch, window)
            window_chunks, window_starts = self._cached[1]
            n = min(len(k) - done, len(window_chunks) - offset)
            chunks[done : done + n] = window_chunks[offset : offset + n]
            starts[done : done + n] = window_starts[offset : offset + n]
            done += n
        return chunks, starts * self.order.span

    def place_after(self, k: int) -> Place:
        """Where the source stands once the first ``k`` blocks of this leg were read."""
        epoch, window, offset = self._locate(k)
        if offset == 0 and (epoch, window) != (self.place.epoch, self.place.window):
            return Place(epoch, window)
        chunks = self._chunks(epoch, window)
        labels = self._labels(chunks, epoch, window)[:offset]
        states = tuple(
            chunk.after(state, self.block, int((labels == i).sum()))
            for i, (chunk, state) in enumerate(chunks)
        )
        return Place(epoch, window, states)

    def _locate(self, k: int) -> tuple[int, int, int]:
        """``(epoch, window, offset in the window)`` of block ``k``."""
        if k < self._first:
            return self.place.epoch, self.place.window, k
        if k < self._first + self._rest:
            epoch, (_, ends) = self.place.epoch, self.order.table(self.place.epoch, self.context)
            k += int(ends[self.place.window]) - self._first
        else:
            epochs, k = divmod(k - self._first - self._rest, self.per_epoch)
            epoch = self.place.epoch + 1 + epochs
            _, ends = self.order.table(epoch, self.context)
        window = int(np.searchsorted(ends, k, side="right"))
        return epoch, window, k - (int(ends[window - 1]) if window else 0)

    def _chunks(self, epoch: int, window: int) -> list[tuple[_Chunk, ChunkState]]:
        chunks = [self.order.chunk(epoch, c) for c in self.order.window_chunks(epoch, window)]
        here = (epoch, window) == (self.place.epoch, self.place.window)
        if here and self.place.states is not None:
            return list(zip(chunks, self.place.states, strict=True))
        return [(chunk, chunk.fresh()) for chunk in chunks]

    def _labels(
        self, chunks: list[tuple[_Chunk, ChunkState]], epoch: int, window: int
    ) -> np.ndarray:
        """Which of the window's chunks supplies its blocks: a random interleaving."""
        counts = [chunk.available(state, self.block) for chunk, state in chunks]
        labels = np.repeat(np.arange(len(counts)), counts)
        return labels[shuffled(len(labels), *self.order.key, epoch, 2, window, self.block)]

    def _window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Chunk index and first span of each block of the window, in reading order."""
        chunks = self._chunks(epoch, window)
        labels = self._labels(chunks, epoch, window)
        starts = np.empty(len(labels), dtype=np.int64)
        for i, (chunk, state) in enumerate(chunks):
            starts[labels == i] = chunk.starts(state, self.block)
        return self.order.window_chunks(epoch, window)[labels], starts
