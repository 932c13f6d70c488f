"""What is trained on next, as a pure function of (seed, curriculum, position).

The *position* is the number of tokens trained on so far. A *curriculum* is a list of segments; in
each one the mixture, the context length and the global batch are constant. A position is therefore
all there is to resume from: no iterator has a state, and workers, ranks and accumulation do not
enter.

Segments that lie behind the position are history and are kept as they were consumed. A changed
configuration opens a new segment at the current position; a source whose context changes in
mid-epoch goes on with what is left of that epoch (see :mod:`smol.data.spans`).
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np

from smol.data.mixture import Mixture
from smol.data.spans import Leg, SourceOrder
from smol.errors import UserError


@dataclass
class SourceConfig:
    """One source of a mixture.

    Attributes:
        path: Prepared folder (local or any fsspec URL).
        weight: Share of the tokens, relative to the other sources of the mixture.
        provenance: Where the source comes from; for people.
    """

    path: str
    weight: float
    provenance: str | None = None


@dataclass
class StageConfig:
    """A stage: from some point on, this mixture at this context length.

    Attributes:
        mixture: Sources by name; ``null`` removes one that a lower file named.
        start_step: First optimiser step of the stage (0-based), or give ``start_tokens``.
        start_tokens: First token of the stage.
        context_length: Tokens per sequence; by default the data module's.
        global_batch_tokens: Tokens per optimiser step; by default the data module's.
    """

    mixture: dict[str, SourceConfig | None]
    start_step: int | None = None
    start_tokens: int | None = None
    context_length: int | None = None
    global_batch_tokens: int | None = None

    @property
    def sources(self) -> dict[str, SourceConfig]:
        return {name: s for name, s in self.mixture.items() if s is not None and s.weight != 0}


@dataclass(frozen=True)
class Segment:
    """A stretch of the curriculum in which nothing changes.

    Attributes:
        start: Position of its first token.
        stop: Position after its last token; ``None`` while open.
        start_step: Optimiser steps before it.
        stage: Name of the stage it belongs to.
        context: Tokens per sequence.
        global_batch: Tokens per optimiser step.
        weights: Source name to weight, as configured.
        digests: Source name to the digest of its data.
        tokens: Source name to tokens consumed in the segment; set when it is closed.
    """

    start: int
    start_step: int
    stage: str
    context: int
    global_batch: int
    weights: dict[str, float]
    digests: dict[str, str]
    stop: int | None = None
    tokens: dict[str, int] = field(default_factory=dict)

    @property
    def stop_step(self) -> int:
        return self.start_step + (self.stop - self.start) // self.global_batch

    def same_data(self, other: "Segment") -> bool:
        """Whether the other segment would go on exactly as this one."""
        keys = ("stage", "context", "global_batch", "weights", "digests")
        return all(getattr(self, key) == getattr(other, key) for key in keys)

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, state: dict) -> "Segment":
        return cls(**state)


def plan(
    stages: Mapping[str, StageConfig],
    digests: Mapping[str, str],
    context_length: int,
    global_batch_tokens: int,
    history: tuple[Segment, ...] = (),
) -> list[Segment]:
    """All segments of a run: its history, and what its stages say of the time after it.

    Args:
        stages: Stages by name, in any order.
        digests: Source name to the digest of its data.
        context_length: Context of the stages that name none.
        global_batch_tokens: Global batch of the stages that name none.
        history: Closed segments; planning goes on where the last one stops.

    Returns:
        Segments in order, the last one open. If the last segment of the history simply goes on, it
        is opened again rather than followed by its twin.

    Raises:
        UserError: no stage starts at 0, two start at the same point, or a batch does not divide.
    """
    position = history[-1].stop if history else 0
    step = history[-1].stop_step if history else 0
    ordered = _ordered(stages)
    segments: list[Segment] = []
    for name, stage in ordered:
        check_positive(f"stage '{name}': global_batch_tokens", stage.global_batch_tokens)
        check_positive(f"stage '{name}': context_length", stage.context_length)
        batch = stage.global_batch_tokens or global_batch_tokens
        context = stage.context_length or context_length
        if batch % context:
            raise UserError(
                f"stage '{name}': global_batch_tokens {batch} is not a multiple of context_length "
                f"{context}; use {max(1, round(batch / context)) * context}"
            )
        start, start_step = position, step
        if segments:
            current = segments[-1]
            if stage.start_tokens is not None:
                steps = -(-(stage.start_tokens - current.start) // current.global_batch)
            else:
                steps = stage.start_step - current.start_step
            if steps <= 0:  # it begins before the current position: it replaces what precedes it
                segments.pop()
            else:
                start = current.start + steps * current.global_batch
                start_step = current.start_step + steps
                segments[-1] = replace(current, stop=start)
        sources = stage.sources
        segments.append(
            Segment(
                start=start,
                start_step=start_step,
                stage=name,
                context=context,
                global_batch=batch,
                weights={source: sources[source].weight for source in sorted(sources)},
                digests={source: digests[source] for source in sorted(sources)},
            )
        )
    if history and history[-1].same_data(segments[0]):
        segments[0] = replace(history[-1], stop=segments[0].stop, tokens={})
        history = history[:-1]
    return [*history, *segments]


def _ordered(stages: Mapping[str, StageConfig]) -> list[tuple[str, StageConfig]]:
    """Stages by their start. Steps and tokens may be mixed only if the order is clear."""
    if not stages:
        raise UserError("data.stages is empty; expected at least one stage with start_step: 0")
    for name, stage in stages.items():
        if (stage.start_step is None) == (stage.start_tokens is None):
            raise UserError(f"stage '{name}' needs exactly one of start_step and start_tokens")
        if not stage.sources:
            raise UserError(f"stage '{name}' has no source with a positive weight in its mixture")
    by_tokens = {stage.start_step is None for _, stage in stages.items() if stage.start_step != 0}
    if len(by_tokens) > 1:
        raise UserError(
            "data.stages mixes start_step and start_tokens; give all stages one of them"
        )

    def start(item: tuple[str, StageConfig]) -> int:
        return item[1].start_step if item[1].start_step is not None else item[1].start_tokens

    ordered = sorted(stages.items(), key=start)
    if start(ordered[0]) != 0:
        raise UserError(f"the first stage, '{ordered[0][0]}', starts at {start(ordered[0])}, not 0")
    for a, b in pairwise(ordered):
        if start(a) == start(b):
            raise UserError(f"stages '{a[0]}' and '{b[0]}' both start at {start(a)}")
    return ordered


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
        """Position of the first token of an optimiser step, if every step consumes one batch."""
        i = bisect_right([s.start_step for s in self.segments], step) - 1
        segment = self.segments[i]
        return segment.start + (step - segment.start_step) * segment.global_batch

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
            past.append(replace(segment, stop=stop, tokens=tokens))
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


def check_positive(key: str, number: int | None) -> None:
    """Refuse 0 and less; ``None`` stands for a default.

    Raises:
        UserError: it is so.
    """
    if number is not None and number < 1:
        raise UserError(f"{key} is {number}; expected a number of at least 1")


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
