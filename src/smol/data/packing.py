"""Packing: which items share a row, so that little of it is padding."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Items by row.

    Attributes:
        order: Every item once, row by row; ``(items,)`` int64.
        starts: Where each row begins in ``order``, and the end; ``(rows + 1,)`` int64.
    """

    order: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """The items of a row, int64."""
        return self.order[self.starts[row] : self.starts[row + 1]]


SHORT = 1 / 8  # of a row


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> Packing:
    """Best-fit bin packing over the whole set: long items decreasing, then the short ones mixed.

    Each item goes to the row with the least room that it fits in, the oldest of several, else to a
    new row. Decreasing order alone fills rows as tightly as is known to be quick (Johnson 1973: at
    most 11/9 of the fewest rows, and a few), but puts like to like: where length tells what an item
    is, a row then holds one kind of it, and a step's gradient is that of a kind. So items of up to
    an eighth of a row come in a shuffled order. They fill the gaps all the same, for some
    thousandths more rows (docs/log.md).

    The result depends on the arguments alone. It takes O(n log n) comparisons.

    Args:
        lengths: Of the items, in tokens; 0 is allowed.
        capacity: Of a row, in tokens.

    Raises:
        ValueError: an item is longer than a row.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and (lengths.max() > capacity or lengths.min() < 0):
        raise ValueError(f"lengths are {lengths.min()} to {lengths.max()}, a row holds {capacity}")
    shuffled = np.random.default_rng(0).permutation(len(lengths))
    rank = np.where(lengths > SHORT * capacity, lengths, 0)[shuffled]
    one_by_one = shuffled[np.argsort(-rank, kind="stable")]
    row_of = np.empty(len(lengths), dtype=np.int64)
    rows = 0
    room: list[int] = []  # what rows have left, each number once, sorted
    rows_with: dict[int, deque[int]] = {}
    for item, length in zip(one_by_one.tolist(), lengths[one_by_one].tolist(), strict=True):
        i = bisect_left(room, length)
        if i == len(room):
            row, left = rows, capacity
            rows += 1
        else:
            left = room[i]
            row = rows_with[left].popleft()
            if not rows_with[left]:
                del rows_with[left], room[i]
        row_of[item] = row
        left -= length
        if left not in rows_with:
            rows_with[left] = deque()
            insort(room, left)
        rows_with[left].append(row)
    order = np.lexsort((np.arange(len(lengths)), row_of))
    starts = np.searchsorted(row_of[order], np.arange(rows + 1))
    return Packing(order, starts)


def pieces(length: int, capacity: int) -> Iterator[slice]:
    """Cut a document that is longer than a row, so that each of its tokens is predicted once.

    Neighbouring pieces share a token, the last of one and the first of the next.

    Args:
        length: Tokens of the document.
        capacity: Tokens of a piece at most, 2 or more.
    """
    yield slice(0, min(length, capacity))
    for start in range(capacity - 1, length - 1, capacity - 1):
        yield slice(start, min(length, start + capacity))
