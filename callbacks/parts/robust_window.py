"""What is usual, by what was accepted so far."""

import math
from collections import deque
from statistics import median


class RobustWindow:
    """The last accepted values, their median, and how far from it a new one is.

    Median and median deviation are moved little by outliers, and a value that is not accepted does
    not move them at all.

    Args:
        size: Values that are kept.
        least: Values before anything counts as far.
        relative: Least standard deviation, as a part of the median.
        absolute: Least standard deviation, in the unit of the values.
    """

    def __init__(self, size: int, least: int, relative: float, absolute: float):
        self.least, self.relative, self.absolute = least, relative, absolute
        self.values: deque[float] = deque(maxlen=size)

    @property
    def usual(self) -> float:
        return median(self.values) if self.values else 0.0

    @property
    def sigma(self) -> float:
        """Standard deviation, as a normal distribution's median deviation would have it."""
        usual = self.usual
        spread = median(abs(value - usual) for value in self.values) if self.values else 0.0
        return max(1.4826 * spread, self.relative * abs(usual), self.absolute)

    def deviation(self, value: float) -> float:
        """Standard deviations above the median, below it negative; 0 while there are too few."""
        if math.isfinite(value) and len(self.values) < self.least:
            return 0.0
        return (value - self.usual) / self.sigma

    def accept(self, value: float) -> None:
        self.values.append(value)

    def reset(self, values: list[float] | tuple = ()) -> None:
        self.values.clear()
        self.values.extend(values)
