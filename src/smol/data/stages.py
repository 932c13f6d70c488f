"""Stages as configured, and the segments of a run that follow from them.

Segments that lie behind the position are history and are kept as they were consumed. A changed
configuration opens a new segment at the current position.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise

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
        skipped: Stretches (from, to) that were consumed, but whose optimiser steps were dropped or
            undone; in order, whole steps each.
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
    skipped: tuple[tuple[int, int], ...] = ()

    @property
    def skipped_tokens(self) -> int:
        return sum(stop - start for start, stop in self.skipped)

    @property
    def stop_step(self) -> int:
        trained = self.stop - self.start - self.skipped_tokens
        return self.start_step + trained // self.global_batch

    def same_data(self, other: "Segment") -> bool:
        """Whether the other segment would go on exactly as this one."""
        keys = ("stage", "context", "global_batch", "weights", "digests")
        return all(getattr(self, key) == getattr(other, key) for key in keys)

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, state: dict) -> "Segment":
        skipped = tuple((start, stop) for start, stop in state.get("skipped", ()))
        return cls(**{**state, "skipped": skipped})


def skip(history: tuple[Segment, ...], start: int, stop: int) -> tuple[Segment, ...]:
    """Closed segments of which what was read from ``start`` to ``stop`` does not count as trained.

    Fewer optimiser steps lie in them then, so each begins at an earlier one.

    Args:
        history: Adjoining closed segments.
        start: Position before the first step that was dropped or undone.
        stop: Position after the last one.
    """
    changed: list[Segment] = []
    for segment in history:
        gap = (max(start, segment.start), min(stop, segment.stop))
        skipped = _merge([*segment.skipped, gap] if gap[0] < gap[1] else segment.skipped)
        first = changed[-1].stop_step if changed else segment.start_step
        changed.append(replace(segment, skipped=skipped, start_step=first))
    return tuple(changed)


def _merge(stretches: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(stretches):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


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


def with_contexts(
    stages: Mapping[str, StageConfig], contexts: Mapping[int, int], unit: str
) -> dict[str, StageConfig]:
    """Stages whose context lengths follow a schedule of their own.

    A stage in which the context changes becomes several, named like ``stage1@400``.

    Args:
        stages: Stages by name.
        contexts: Context length from each optimiser step, or token, on; one of them from 0 on.
        unit: ``"steps"`` or ``"tokens"``, of the keys of ``contexts``.

    Raises:
        UserError: nothing is said of the beginning, the stages count in the other unit, or one of
            them has a context length of its own.
    """
    field_name = {"steps": "start_step", "tokens": "start_tokens"}[unit]
    if 0 not in contexts:
        raise UserError(f"contexts begin at {min(contexts, default=None)}; expected an entry for 0")
    made: dict[str, StageConfig] = {}
    ordered = _ordered(stages)
    starts = []
    for name, stage in ordered:
        start = 0 if stage.start_step == 0 else getattr(stage, field_name)
        if start is None:
            raise UserError(f"contexts count in {unit}, but stage '{name}' does not; use its unit")
        if stage.context_length is not None:
            raise UserError(
                f"stage '{name}' has context_length {stage.context_length}, and contexts say it, "
                "too; leave one of them out"
            )
        starts.append(start)
    for (name, stage), start, stop in zip(
        ordered, starts, [*starts[1:], float("inf")], strict=True
    ):
        for at in sorted({start, *(c for c in contexts if start < c < stop)}):
            context = contexts[max(c for c in contexts if c <= at)]
            place = {"start_step": None, "start_tokens": None, field_name: at}
            label = name if at == start else f"{name}@{at}"
            made[label] = replace(stage, **place, context_length=context)
    return made


def check_positive(key: str, number: int | None) -> None:
    """Refuse 0 and less; ``None`` stands for a default.

    Raises:
        UserError: it is so.
    """
    if number is not None and number < 1:
        raise UserError(f"{key} is {number}; expected a number of at least 1")
