"""Each token once an epoch, under any change of context; little lost; a seeded, local order."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smol.data.spans import Leg, Place, SourceOrder
from smol.errors import UserError

SPAN = 8


def read_all(leg: Leg, n: int, first: int = 0) -> list[tuple[int, int]]:
    chunks, starts = leg.read(np.arange(first, first + n))
    return list(zip(chunks.tolist(), starts.tolist(), strict=True))


def epoch_blocks(order: SourceOrder, context: int, epoch: int) -> list[tuple[int, int]]:
    leg = Leg(order, context)
    return read_all(leg, leg.per_epoch, epoch * leg.per_epoch)


@given(
    chunk_tokens=st.lists(st.integers(0, 60 * SPAN), min_size=1, max_size=9),
    doublings=st.integers(0, 4),
    window=st.integers(1, 4),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_one_epoch_reads_every_whole_block_once(chunk_tokens, doublings, window, seed, epoch):
    context = SPAN << doublings
    order = SourceOrder("s", chunk_tokens, SPAN, SPAN << 4, window, seed)
    expected = Counter(
        (c, start)
        for c, n in enumerate(chunk_tokens)
        for start in range(0, n - context, context)
        if start + context + 1 <= n
    )
    if not expected:
        with pytest.raises(UserError, match="holds no block"):
            Leg(order, context)
        return
    assert Counter(epoch_blocks(order, context, epoch)) == expected


few_blocks = st.tuples(st.integers(0, 4), st.integers(0, 3))
many_blocks = st.tuples(st.integers(0, 4), st.integers(0, 60))


@settings(max_examples=400, deadline=None)
@given(
    chunk_tokens=st.lists(st.integers(17 * SPAN, 90 * SPAN), min_size=1, max_size=6),
    window=st.integers(1, 3),
    seed=st.integers(0, 100),
    changes=st.lists(many_blocks, min_size=1, max_size=12) | st.lists(few_blocks, min_size=20),
)
def test_any_changes_of_context_read_no_token_twice_and_lose_little(
    chunk_tokens, window, seed, changes
):
    longest = SPAN << 4
    order = SourceOrder("s", chunk_tokens, SPAN, longest, window, seed)
    seen: dict[int, Counter] = {}
    lost: list[int] = []
    place = Place()

    def consume(leg: Leg, n: int) -> None:
        for k, (chunk, start) in enumerate(read_all(leg, n)):
            spans = range(start // SPAN, (start + leg.context) // SPAN)
            counter = seen.setdefault(leg.epoch(k), Counter())
            counter.update((chunk, s) for s in spans)
            assert start + leg.context + 1 <= chunk_tokens[chunk]

    for doublings, n in changes:
        leg = Leg(order, SPAN << doublings, place)
        consume(leg, n)
        place = leg.place_after(n)
    # Finish the epoch at the last context, then count.
    leg = Leg(order, SPAN << changes[-1][0], place)
    rest = next(k for k in range(10**6) if leg.epoch(k) > place.epoch)
    consume(leg, rest)
    for epoch, counter in seen.items():
        assert max(counter.values()) == 1
        read_per_chunk = Counter(chunk for chunk, _ in counter)
        for chunk, n in enumerate(chunk_tokens):
            lost.append((n - 1) // SPAN - read_per_chunk[chunk])
        assert epoch <= place.epoch
    assert max(lost) * SPAN < longest


def test_a_leg_resumed_at_the_same_context_is_read_as_if_it_had_not_stopped():
    # The rest of a window is interleaved anew, but it holds the same blocks.
    order = SourceOrder("s", [1000, 700, 900, 1200], SPAN, 64, 2, seed=3)
    whole = Leg(order, 32)
    for stop in range(0, whole.per_epoch + 5, 7):
        rest = Leg(order, 32, whole.place_after(stop))
        n = 3 * whole.per_epoch - stop
        assert Counter(read_all(rest, n)) == Counter(read_all(whole, n, stop))


def test_reading_in_pieces_equals_reading_at_once_and_epochs_differ():
    order = SourceOrder("s", [5000, 4000, 6000, 2000, 7000], SPAN, 64, 2, seed=1)
    leg = Leg(order, 16)
    n = 2 * leg.per_epoch + 17
    whole = read_all(leg, n)
    pieces = [b for k in range(0, n, 13) for b in read_all(Leg(order, 16), min(13, n - k), k)]
    assert pieces == whole
    assert whole[: leg.per_epoch] != whole[leg.per_epoch : 2 * leg.per_epoch]
    other = SourceOrder("s", [5000, 4000, 6000, 2000, 7000], SPAN, 64, 2, seed=2)
    assert read_all(Leg(other, 16), leg.per_epoch) != whole[: leg.per_epoch]


def test_neighbours_in_the_text_are_not_neighbours_in_the_order():
    order = SourceOrder("s", [SPAN * 400 + 1] * 8, SPAN, SPAN, window=4, seed=0)
    blocks = epoch_blocks(order, SPAN, 0)
    follows = sum(a[0] == b[0] and b[1] - a[1] == SPAN for a, b in pairwise(blocks))
    assert follows < 0.01 * len(blocks)


def test_few_chunks_are_open_at_a_time():
    order = SourceOrder("s", [SPAN * 50 + 1] * 40, SPAN, SPAN * 4, window=4, seed=0)
    blocks = epoch_blocks(order, SPAN, 0)
    last = {chunk: i for i, (chunk, _) in enumerate(blocks)}
    opened: set[int] = set()
    for i, (chunk, _) in enumerate(blocks):
        opened.add(chunk)
        opened = {c for c in opened if last[c] >= i}
        assert len(opened) <= 4


def test_a_source_of_trillions_of_tokens_is_entered_anywhere_at_once():
    order = SourceOrder("s", [2**24] * 300_000, 4096, 65536, window=8, seed=6)
    leg = Leg(order, 4096)
    k = 10 * leg.per_epoch + 12345
    assert leg.epoch(k) == 10
    assert len(read_all(leg, 100, k)) == 100
