"""The curriculum: planning, history, and exactness under every change a user can make."""

import json
import pickle
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smol.data.curriculum import Curriculum, check_history
from smol.data.spans import SourceOrder
from smol.data.stages import Segment, SourceConfig, StageConfig, plan, skip
from smol.errors import UserError

SPAN, LONGEST = 8, 32
CHUNKS = {"code": [900, 700, 1100], "maths": [500, 640], "prose": [1300, 800, 999, 1024]}


def make_orders(chunks=CHUNKS, seed=1):
    return {n: SourceOrder(n, c, SPAN, LONGEST, window=2, seed=seed) for n, c in chunks.items()}


def digests_of(orders):
    return {name: f"digest of {name}" for name in orders}


def stage(start, context=None, batch=None, **weights):
    mixture = {n: SourceConfig(path=n, weight=w) for n, w in weights.items()}
    return StageConfig(mixture, start_step=start, context_length=context, global_batch_tokens=batch)


def build(stages, history=(), context=16, batch=64, orders=None):
    orders = orders or make_orders()
    digests = digests_of(orders)
    return Curriculum(plan(stages, digests, context, batch, history), orders, digests)


def steps(curriculum, position, n):
    """Per optimiser step: the sorted (source, chunk, start, context) of its sequences."""
    result = []
    for _ in range(n):
        samples = curriculum.step_samples(position)
        segment = samples.segment
        names = [curriculum.names[i] for i in samples.source]
        contexts = [segment.context] * len(names)
        rows = zip(names, samples.chunk.tolist(), samples.start.tolist(), contexts, strict=True)
        result.append((position, tuple(rows)))
        position += segment.global_batch
    return result


STAGES = {
    "one": stage(0, prose=0.84, code=0.13, maths=0.03),
    "two": stage(20, prose=0.5, code=0.3, maths=0.2),
    "long": stage(35, context=32, prose=0.5, code=0.5),
    "short": stage(50, context=8, batch=128, prose=0.6, code=0.3, maths=0.1),
}


def test_stages_begin_where_they_say():
    curriculum = build(STAGES)
    starts = [(s.stage, s.start, s.start_step) for s in curriculum.segments]
    assert starts == [("one", 0, 0), ("two", 1280, 20), ("long", 2240, 35), ("short", 3200, 50)]
    assert curriculum.position_of_step(60) == 3200 + 10 * 128


def test_tokens_give_the_same_plan_as_steps():
    in_tokens = {
        "one": StageConfig(STAGES["one"].mixture, start_tokens=0),
        "two": StageConfig(STAGES["two"].mixture, start_tokens=1280),
    }
    assert build(in_tokens).segments == build({k: STAGES[k] for k in ("one", "two")}).segments


@given(stop=st.integers(0, 70))
@settings(max_examples=40, deadline=None)
def test_interrupted_equals_uninterrupted(stop):
    whole = build(STAGES)
    expected = steps(whole, 0, 75)
    position = expected[stop][0]
    saved = json.loads(json.dumps([s.to_json() for s in whole.history(position)]))
    history = tuple(Segment.from_json(s) for s in saved)
    resumed = build(STAGES, history)
    check_history(history, resumed)
    assert steps(resumed, position, 75 - stop) == expected[stop:]
    assert resumed.tokens(position) == whole.tokens(position)


@given(
    changes=st.lists(
        st.tuples(
            st.integers(0, 12),
            st.sampled_from([8, 16, 32]),
            st.sampled_from([32, 64, 96]),
            st.dictionaries(st.sampled_from(sorted(CHUNKS)), st.integers(1, 9), min_size=1),
        ),
        min_size=1,
        max_size=7,
    )
)
@settings(max_examples=150, deadline=None)
def test_changes_of_weights_batch_context_and_sources_read_no_token_twice_in_an_epoch(changes):
    """Each change is a resume with another configuration, at whatever point was reached."""
    history, position = (), 0
    seen: dict[tuple[str, int], Counter] = {}
    for n, context, batch, weights in changes:
        curriculum = build({"s": stage(0, **weights)}, history, context, batch)
        for _ in range(n):
            samples = curriculum.step_samples(position)
            segment = samples.segment
            for i, chunk, start in zip(samples.source, samples.chunk, samples.start, strict=True):
                spans = [(chunk, start // SPAN + j) for j in range(context // SPAN)]
                seen.setdefault(curriculum.names[i], []).append(spans)
            position += segment.global_batch
        history = curriculum.history(position)
    for name, blocks in seen.items():
        # Blocks come epoch by epoch: a span may come again only once the epoch has ended, that is
        # when fewer whole blocks than one longest one per chunk were left unread.
        epoch: set = set()
        for block in blocks:
            if epoch & set(block):
                spans = sum((c - 1) // SPAN for c in CHUNKS[name])
                lost = spans - len(epoch)
                assert lost < len(CHUNKS[name]) * LONGEST // SPAN
                epoch = set()
            epoch.update(block)


def run_with_faults(fates, interrupt_after=None):
    """Train as the loader does: a step is taken, dropped, or it undoes so many steps before it.

    Returns:
        Of each attempt the completed steps before it, its samples and its stage.
    """
    curriculum, position, step, attempts, taken = build(STAGES), 0, 0, [], []
    for i, fate in enumerate(fates):
        segment = curriculum.segment(position)
        attempts.append((step, steps(curriculum, position, 1), segment.stage))
        before, position = position, position + segment.global_batch
        if fate is None:
            step += 1
            taken.append(before)
        else:
            undone = min(fate, len(taken))
            first = taken[-undone] if undone else before
            del taken[len(taken) - undone :]
            step -= undone
            history = skip(curriculum.history(position), first, position)
            curriculum = build(STAGES, history)
        if i == interrupt_after:
            saved = json.dumps([s.to_json() for s in curriculum.history(position)])
            curriculum = build(STAGES, tuple(Segment.from_json(s) for s in json.loads(saved)))
    assert curriculum.history(position)[-1].stop_step == step
    return attempts


fates = st.lists(st.sampled_from([None] * 12 + [0, 0, 1, 3, 9]), min_size=60, max_size=90)


@given(fates, st.integers(0, 59))
@settings(max_examples=60, deadline=None)
def test_stages_begin_at_their_step_whatever_was_dropped_or_undone(fates, interrupt_after):
    attempts = run_with_faults(fates)
    for step, _, stage_name in attempts:
        assert stage_name == [n for n, s in STAGES.items() if s.start_step <= step][-1]
    assert run_with_faults(fates, interrupt_after) == attempts


def test_skipped_stretches_are_kept_and_merged():
    curriculum = build(STAGES)
    history = skip(curriculum.history(1280 + 128), 1280 - 64, 1280 + 64)
    history = skip(history, 1280 + 64, 1280 + 128)
    assert [s.skipped for s in history] == [((1216, 1280),), ((1280, 1408),)]
    assert [(s.start_step, s.stop_step) for s in history] == [(0, 19), (19, 19)]
    again = build(STAGES, history)
    assert again.segment(1408).stage == "one"  # one step of it is still to be taken
    assert again.segment(1408 + 64).stage == "two"
    assert again.position_of_step(20) == 1408 + 64


def test_changed_configuration_opens_a_segment_and_leaves_the_past_alone():
    before = build({"one": STAGES["one"]})
    history = before.history(640)
    changed = build({"one": stage(0, prose=0.1, code=0.9)}, history)
    assert [(s.start, s.stop) for s in changed.segments] == [(0, 640), (640, None)]
    assert steps(changed, 0, 10) == steps(before, 0, 10)
    unchanged = build({"one": STAGES["one"]}, history)
    assert [(s.start, s.stop) for s in unchanged.segments] == [(0, None)]
    counts = Counter(row[0] for _, rows in steps(changed, 640, 20) for row in rows)
    assert counts["code"] > 60
    assert counts["maths"] == 0


def test_a_changed_batch_moves_later_stages_by_steps():
    history = build({"one": STAGES["one"]}).history(640)  # ten steps of 64
    stages = {"one": stage(0, batch=128, prose=1), "two": stage(20, prose=1, code=1)}
    assert [(s.start, s.start_step) for s in build(stages, history).segments] == [
        (0, 0),
        (640, 10),
        (640 + 10 * 128, 20),
    ]


def test_a_removed_source_may_come_back_without_repeating_itself():
    first = build({"s": stage(0, prose=1, code=1)})
    second = build({"s": stage(0, prose=1)}, first.history(640))
    third = build({"s": stage(0, prose=1, code=1)}, second.history(1280))
    code = [row[1:3] for position, rows in steps(third, 0, 40) for row in rows if row[0] == "code"]
    assert len(code) == len(set(code)) > 40


def test_a_source_gone_from_disk_keeps_its_place_in_the_history():
    history = build({"s": stage(0, prose=1, code=1)}).history(640)
    orders = make_orders({"prose": CHUNKS["prose"]})
    curriculum = build({"s": stage(0, prose=1)}, history, orders=orders)
    check_history(history, curriculum)
    assert curriculum.tokens(640) == {"prose": 320, "code": 320}


def test_changed_counts_are_noticed():
    history = build({"s": stage(0, prose=1, code=1)}).history(640)
    wrong = (Segment(**{**history[0].__dict__, "tokens": {"prose": 100, "code": 540}}),)
    with pytest.raises(UserError, match="consumed 540 tokens of 'code'|consumed 100 tokens"):
        check_history(wrong, build({"s": stage(0, prose=1, code=1)}, wrong))


def test_tokens_and_epochs_are_known_ahead():
    curriculum = build(STAGES)
    position = curriculum.position_of_step(70)
    counted = Counter()
    for _, rows in steps(curriculum, 0, 70):
        for name, _, _, context in rows:
            counted[name] += context
    assert curriculum.tokens(position) == counted
    usable = sum((c - 1) // SPAN * SPAN for c in CHUNKS["code"])
    assert curriculum.epochs(position)["code"] == pytest.approx(counted["code"] / usable)


@pytest.mark.parametrize(
    ("stages", "match"),
    [
        ({}, "data.stages is empty"),
        ({"a": stage(5, prose=1)}, "'a', starts at 5, not 0"),
        ({"a": stage(0, prose=1), "b": stage(0, prose=1)}, "both start at 0"),
        ({"a": stage(0)}, "no source"),
        ({"a": StageConfig({}, None, None)}, "exactly one of start_step and start_tokens"),
        ({"a": stage(0, context=24, batch=48, prose=1)}, "times a power of two; use 32"),
        ({"a": stage(0, context=64, prose=1)}, "exceeds longest_context 32"),
        ({"a": stage(0, context=32, batch=80, prose=1)}, "not a multiple of context_length 32"),
    ],
)
def test_impossible_stages_are_one_line(stages, match):
    with pytest.raises(UserError, match=match) as error:
        build(stages)
    assert "\n" not in str(error.value)


def test_a_context_that_no_chunk_holds_is_one_line():
    with pytest.raises(UserError, match="'tiny' holds no block of 32 tokens"):
        build({"a": stage(0, context=32, tiny=1)}, orders=make_orders({"tiny": [20, 30]}))


def smollm3_sized():
    """57 sources of about 200 billion tokens each, in chunks of 2**24."""
    names = [f"source_{i:02d}" for i in range(57)]
    orders = {
        n: SourceOrder(n, np.full(12_000, 2**24), 4096, 65536, window=4, seed=6) for n in names
    }
    weights = {n: 1 + i % 7 for i, n in enumerate(names)}
    batch = 2_359_296
    stages = {"one": stage(0, **weights), "two": stage(3_450_000, **weights)}
    digests = digests_of(orders)
    segments = plan(stages, digests, 4096, batch)
    return Curriculum(segments, orders, digests)


def test_step_4_700_000_of_57_sources_is_reached_at_once_and_needs_no_more_memory():
    def enter(step):
        tracemalloc.start()
        begin = time.perf_counter()
        curriculum = smollm3_sized()
        samples = curriculum.step_samples(curriculum.position_of_step(step))
        seconds = time.perf_counter() - begin
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(samples.source) == 576
        return seconds, peak

    enter(0)
    early, late = enter(0), enter(4_700_000)
    assert late[0] < max(3.0, 3 * early[0])  # tracing slows everything; the ratio is the point
    assert late[1] < 1.3 * early[1]


def test_a_curriculum_travels_to_workers():
    curriculum = build(STAGES)
    copy = pickle.loads(pickle.dumps(curriculum))
    assert steps(copy, 0, 60) == steps(curriculum, 0, 60)
