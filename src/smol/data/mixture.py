"""Which source supplies sample number ``k``: a weighted mixture in closed form.

No generator is advanced and nothing is simulated from zero. The weights become the leaves of a
Huffman tree; at each node, of the first ``k`` samples exactly ``floor(k * p + 1/2)`` go left, where
``p`` is the exact rational share of the left child. Counts are therefore a composition of integer
functions, computed in O(log sources) for any ``k``, and they never drift: the realised count of a
source differs from ``weight * k`` by less than two samples at every ``k``.

Why less than two: rounding adds at most 1/2 at each node, and an error made at an ancestor reaches
the leaf scaled by (leaf weight / weight of the ancestor's child on the path). In a Huffman tree
those path weights grow at least like the Fibonacci numbers (a node's sibling was not lighter than
the node's own children), so the total is at most half the reciprocal Fibonacci constant, 1.68.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count

import numpy as np

from smol.errors import UserError


@dataclass(frozen=True)
class _Node:
    """An inner node: ``left`` of every ``total`` units of weight go to the left child."""

    left_weight: int
    total_weight: int
    left: "_Node | int"
    right: "_Node | int"

    def left_count(self, k: int) -> int:
        """``floor(k * left_weight / total_weight + 1/2)`` in integers."""
        return (2 * k * self.left_weight + self.total_weight) // (2 * self.total_weight)

    def left_choices(self, start: int, stop: int) -> np.ndarray:
        """Whether each local sample in ``[start, stop)`` goes left. Shape ``(stop - start,)``."""
        twice_total = 2 * self.total_weight
        # Rebasing at ``start`` keeps the numbers small enough for machine integers.
        remainder = (2 * start * self.left_weight + self.total_weight) % twice_total
        n = stop - start
        largest = remainder + 2 * self.left_weight * n
        dtype = np.int64 if largest < 2**63 else object
        steps = np.arange(n + 1, dtype=dtype)
        counts = (remainder + 2 * self.left_weight * steps) // twice_total
        return (counts[1:] - counts[:-1]).astype(bool)


class Mixture:
    """An exact, seekable interleaving of named sources by weight.

    Args:
        weights: name to weight. Weights are normalised; a source of weight 0 is never chosen.
            Decimal weights are taken exactly as written (0.1 is one tenth).

    Raises:
        UserError: no positive weight, or a weight that is negative or not finite.
    """

    def __init__(self, weights: Mapping[str, float | int | Fraction]):
        self.names: tuple[str, ...] = tuple(sorted(weights))
        exact = {name: _exact(name, weights[name]) for name in self.names}
        total = sum(exact.values())
        if total <= 0:
            raise UserError(f"the mixture {dict(weights)} has no source with a positive weight")
        self.shares: dict[str, Fraction] = {name: w / total for name, w in exact.items()}
        self._root = _huffman([self.shares[name] for name in self.names])

    def counts(self, k: int) -> dict[str, int]:
        """How many of the first ``k`` samples each source supplies."""
        result = dict.fromkeys(self.names, 0)
        stack = [(self._root, k)]
        while stack:
            node, n = stack.pop()
            if isinstance(node, int):
                result[self.names[node]] = n
            else:
                left = node.left_count(n)
                stack += [(node.left, left), (node.right, n - left)]
        return result

    def choose(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources of the samples ``[start, stop)``.

        Returns:
            Two int64 arrays of shape ``(stop - start,)``: the index into ``names`` of each
            sample's source, and its running number within that source.
        """
        source = np.empty(stop - start, dtype=np.int64)
        local = np.empty(stop - start, dtype=np.int64)
        stack = [(self._root, np.arange(stop - start), start, stop)]
        while stack:
            node, where, begin, end = stack.pop()
            if begin == end:
                continue
            if isinstance(node, int):
                source[where] = node
                local[where] = np.arange(begin, end)
                continue
            left_begin, left_end = node.left_count(begin), node.left_count(end)
            left = node.left_choices(begin, end)
            stack.append((node.left, where[left], left_begin, left_end))
            stack.append((node.right, where[~left], begin - left_begin, end - left_end))
        return source, local


def _exact(name: str, weight: float | int | Fraction) -> Fraction:
    try:
        # str() gives the decimal the user wrote, not the binary fraction nearest to it.
        exact = weight if isinstance(weight, Fraction) else Fraction(str(weight))
    except ValueError:
        exact = None
    if exact is None or exact < 0:
        raise UserError(f"weight of source '{name}' is {weight}; expected a number >= 0")
    return exact


def _huffman(shares: Sequence[Fraction]) -> _Node | int:
    """Merge the two lightest nodes until one is left; ties go to the earlier name."""
    tiebreak = count()
    heap = [(share, next(tiebreak), leaf) for leaf, share in enumerate(shares) if share > 0]
    heapq.heapify(heap)
    while len(heap) > 1:
        right_share, _, right = heapq.heappop(heap)
        left_share, _, left = heapq.heappop(heap)
        total = left_share + right_share
        split = left_share / total
        node = _Node(split.numerator, split.denominator, left, right)
        heapq.heappush(heap, (total, next(tiebreak), node))
    return heap[0][2]
