"""A measured mean with the interval that its number of items leaves open."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # 97.5 % of a normal distribution lies below
RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A mean over items and its 95 % confidence interval.

    The interval is about other items of the same kind, not about other training runs.

    Attributes:
        value: What was measured.
        low: Lower end of the interval; ``None`` where there is none.
        high: Upper end; likewise.
        items: How many items were measured.
    """

    value: float
    low: float | None
    high: float | None
    items: int

    def scaled(self, offset: float, factor: float) -> "Estimate":
        """The same estimate of ``(value - offset) * factor``, for a positive factor."""
        ends = (self.value, self.low, self.high)
        return Estimate(*(x if x is None else (x - offset) * factor for x in ends), self.items)


def proportion(hits: Sequence[bool] | Sequence[int]) -> Estimate:
    """The share of hits, with Wilson's score interval.

    It keeps within 0 and 1 and its coverage for few items or extreme shares, where the usual
    ``p ± z·sqrt(p(1-p)/n)`` has neither (Wilson 1927, https://doi.org/10.2307/2276774).

    Args:
        hits: One truth value per item, at least one item.
    """
    n, share = len(hits), sum(map(bool, hits)) / len(hits)
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Estimate(share, min(share, low), max(share, high), n)  # they may meet, up to rounding


def ratio(numerators: Sequence[float], denominators: Sequence[float] | None = None) -> Estimate:
    """The sum of numerators over the sum of denominators, with a bootstrap interval.

    Items are drawn again with replacement, each with both of its numbers; the interval lies between
    the 2.5th and the 97.5th percentile (Efron & Tibshirani 1993, chapter 13). The draws have a
    fixed seed. One item alone says nothing of others, and has no interval.

    Args:
        numerators: One per item, at least one item.
        denominators: One per item, of a positive sum; ``None`` counts items, which gives the mean.
    """
    over = np.asarray(numerators, float)
    under = np.ones_like(over) if denominators is None else np.asarray(denominators, float)
    value = float(over.sum() / under.sum())
    if len(over) == 1:
        return Estimate(value, None, None, 1)
    rng = np.random.default_rng(0)
    # How often each item is drawn, as weights: (resamples, items).
    draws = rng.multinomial(len(over), np.full(len(over), 1 / len(over)), RESAMPLES)
    below = draws @ under
    means = (draws @ over)[below > 0] / below[below > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(value, float(low), float(high), len(over))
