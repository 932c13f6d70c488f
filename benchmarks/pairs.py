"""Ratios of times that were taken in turn, with what is known of them."""

import statistics
from collections.abc import Sequence


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and two order statistics with it between them at 95 % or a little more.

    A neighbour that takes the processor for a second spoils some values a lot, which hardly moves
    a median. The interval is exact for any distribution; with five values or fewer it is all of
    them, which holds for less.
    """
    ordered, count = sorted(values), len(values)
    below, outside, combinations = 0, 1 / 2**count, 1
    while below < (count - 1) // 2:
        combinations = combinations * (count - below) // (below + 1)
        outside += combinations / 2**count
        if 2 * outside > 0.05:
            break
        below += 1
    # ``below`` values may lie outside on either side.
    return statistics.median(ordered), ordered[below], ordered[count - 1 - below]
