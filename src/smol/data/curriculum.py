"""What is trained on next, as a pure function of (seed, curriculum, position).

The *position* is the number of tokens trained on so far. A *curriculum* is a list of segments; in
each one the mixture, the context length and the global batch are constant. A position is therefore
all there is to resume from: no iterator has a state, and workers, ranks and accumulation do not
enter.

What the segments are is planned in :mod:`smol.data.stages`. A source whose context changes in
mid-epoch goes on with what is left of that epoch (see :mod:`smol.data.spans`).
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from smol.data.mixture import Mixture
from smol.data.spans import Leg, SourceOrder
from smol.data.stages import Segment
from smol.errors import UserError


@dataclass(frozen=True)
class Samples:
    """The sequences of one optimiser step; arrays of shape ``(sequences,)``, int64.

    Attributes:
        segment: The segment they belong to.
        source: Index into ``Curriculum.names``.
        chunk: Chunk of that source.
        start: First token in the chunk.
    """

    segment: Segment
    source: np.ndarray
    chunk: np.ndarray
    start: np.ndarray


class _Compiled:
    """A segment with its mixture and, per source, the leg it reads and where in it."""

    def __init__(self, segment: Segment, legs: dict[str, tuple[Leg, int]]):
        self.segment, self.legs = segment, legs
        self.mixture = Mixture(segment.weights)

    def counts(self, position: int) -> dict[str, int]:
        """Sequences of each source between the segment's start and ``position``."""
        return self.mixture.counts((position - self.segment.start) // self.segment.context)


class Curriculum:
    """Random access to all that will ever be trained on.

    Args:
        segments: Adjoining segments, the first at position 0, the last one open.
        orders: Source name to its reading order. History may name sources that are gone.
        digests: Source name to the digest of the data behind its order.

    Raises:
        UserError: a context is not the span times a power of two, or exceeds the longest one, or a
            source has no block that long.
    """

    def __init__(
        self,
        segments: list[Segment],
        orders: Mapping[str, SourceOrder],
        digests: Mapping[str, str],
    ):
        self.orders = dict(orders)
        self.names = tuple(sorted(self.orders))
        self._index = {name: i for i, name in enumerate(self.names)}
        self._compiled: list[_Compiled] = []
        legs: dict[str, tuple[Leg, int]] = {}
        for segment in segments:
            if self._compiled:
                for name, n in self._compiled[-1].counts(segment.start).items():
                    if name in self._compiled[-1].legs:
                        leg, offset = legs[name]
                        legs[name] = leg, offset + n
            present = {}
            for name, digest in segment.digests.items():
                if digests.get(name) != digest:
                    continue  # other data, read in the past: it has no order any more
                order = self.orders[name]
                check_context(segment.context, order.span, order.longest)
                if name not in legs:
                    legs[name] = Leg(order, segment.context), 0
                elif legs[name][0].context != segment.context:
                    leg, offset = legs[name]
                    legs[name] = Leg(order, segment.context, leg.place_after(offset)), 0
                present[name] = legs[name]
            self._compiled.append(_Compiled(segment, present))
        self._starts = [segment.start for segment in segments]
        self.step_samples = lru_cache(maxsize=2)(self._step_samples)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "step_samples"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.step_samples = lru_cache(maxsize=2)(self._step_samples)

    @property
    def segments(self) -> list[Segment]:
        return [compiled.segment for compiled in self._compiled]

    def _at(self, position: int) -> _Compiled:
        return self._compiled[bisect_right(self._starts, position) - 1]

    def segment(self, position: int) -> Segment:
        """The segment that supplies the token after ``position``."""
        return self._at(position).segment

    def position_of_step(self, step: int) -> int:
        """Position of the first token of an optimiser step, if no step from now on is dropped."""
        i = bisect_right([s.start_step for s in self.segments], step) - 1
        segment = self.segments[i]
        trained = (step - segment.start_step) * segment.global_batch
        return segment.start + trained + segment.skipped_tokens

    def _step_samples(self, position: int) -> Samples:
        """All sequences of the optimiser step that begins at ``position``."""
        compiled = self._at(position)
        segment = compiled.segment
        first = (position - segment.start) // segment.context
        n = segment.global_batch // segment.context
        chosen, local = compiled.mixture.choose(first, first + n)
        source, chunk, start = (np.empty(n, dtype=np.int64) for _ in range(3))
        for i in np.unique(chosen):
            where = chosen == i
            name = compiled.mixture.names[i]
            leg, offset = compiled.legs[name]
            source[where] = self._index[name]
            chunk[where], start[where] = leg.read(offset + local[where])
        return Samples(segment, source, chunk, start)

    def tokens(self, position: int) -> dict[str, int]:
        """Tokens consumed from each source before ``position``."""
        totals = dict.fromkeys(self.names, 0)
        for compiled in self._compiled:
            segment = compiled.segment
            if segment.start >= position:
                break
            stop = position if segment.stop is None else min(position, segment.stop)
            for name, n in compiled.counts(stop).items():
                totals[name] = totals.get(name, 0) + n * segment.context
        return totals

    def epochs(self, position: int) -> dict[str, float]:
        """How often each source was read before ``position``, in epochs of whole spans."""
        return {
            name: n / self.orders[name].tokens_per_epoch
            for name, n in self.tokens(position).items()
            if name in self.orders
        }

    def history(self, position: int) -> tuple[Segment, ...]:
        """The segments before ``position``, the last one closed there."""
        past = []
        for compiled in self._compiled:
            segment = compiled.segment
            if segment.start >= position:
                break
            stop = position if segment.stop is None else min(position, segment.stop)
            tokens = {name: n * segment.context for name, n in compiled.counts(stop).items()}
            skipped = tuple((a, min(b, stop)) for a, b in segment.skipped if a < stop)
            past.append(replace(segment, stop=stop, tokens=tokens, skipped=skipped))
        return tuple(past)


def check_context(context: int, span: int, longest: int) -> None:
    """Contexts nest: the span times a power of two, up to the longest.

    Raises:
        UserError: it is not so.
    """
    blocks, rest = divmod(context, span)
    if rest or blocks & (blocks - 1) or not blocks:
        raise UserError(
            f"context_length {context} is not shortest_context {span} times a power of two; "
            f"use {span * 2 ** max(0, round(np.log2(max(1, context / span))))}"
        )
    if context > longest:
        raise UserError(
            f"context_length {context} exceeds longest_context {longest}, fixed when a run "
            "begins; begin a new one from its weights with init_from"
        )


def check_history(history: tuple[Segment, ...], curriculum: Curriculum) -> None:
    """Recompute what was consumed and compare it with what the checkpoint recorded.

    Raises:
        UserError: the counts differ, so this version of the mixture is not the run's.
    """
    again = curriculum.history(history[-1].stop) if history else ()
    for was, now in zip(history, again, strict=True):
        for name, tokens in was.tokens.items():
            if now.tokens[name] != tokens:
                raise UserError(
                    f"the checkpoint consumed {tokens} tokens of '{name}' in {was.stage}, this "
                    f"version would have consumed {now.tokens[name]}; go on with the version that "
                    "made it, or begin a new run from its weights with init_from"
                )
