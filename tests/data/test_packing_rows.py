"""Packed rows, read by position: nothing lost or leaked, and the same after any interruption."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smol.data.batch import IGNORE
from smol.data.chat import Rendered
from smol.data.loader import Layout
from smol.data.packed import PackedRows, open_items, write_items
from smol.data.packed_data import HeldOutItems, PackedData, choose

CONTEXT = 16
PAD = 3
ITEM = st.lists(st.lists(st.booleans(), min_size=1, max_size=8), min_size=1, max_size=2)


def make_items(folder, items):
    """Items of the given masks; every token is a number of its own."""
    count = iter(range(10, 10**6))
    rendered = [
        [
            Rendered(np.array([next(count) for _ in mask], np.int32), np.array(mask, bool))
            for mask in item
        ]
        for item in items
    ]
    write_items(folder, rendered)
    return open_items(folder)


class TinyData(PackedData):
    """Two sets of random items."""

    def __init__(self, folder, trainer=None, **kwargs):
        super().__init__("", CONTEXT, **({"global_batch_tokens": 128} | kwargs))
        rng = np.random.default_rng(0)
        sets = []
        for name in ("a", "b"):
            masks = [[rng.random(rng.integers(2, 9)) < 0.5] for _ in range(37)]
            sets.append(make_items(folder / name, masks))
        self.tokenizer = type("", (), {"eos_id": PAD, "backend": Backend})()
        self.use(("a", "b"), sets, np.arange(74), [sets[1]])


class Backend:
    @staticmethod
    def token_to_id(token):
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("items")


def make_data(folder, **kwargs):
    return TinyData(folder, **({"micro_batch_tokens": 32} | kwargs))


@given(st.lists(ITEM, min_size=1, max_size=20))
def test_rows_hold_every_document_once_and_nothing_else(tmp_path_factory, items):
    stored = make_items(tmp_path_factory.mktemp("x") / "items", items)
    rows = PackedRows([stored], np.arange(len(stored)), CONTEXT, PAD)
    batch = rows.batch(range(len(rows)))
    seen = Counter()
    for row in range(len(rows)):
        numbers, tokens = batch.documents[row], batch.tokens[row]
        assert (numbers.diff() >= 0).all()
        documents = [d for i in batch.items[row].tolist() if i >= 0 for d in stored.item(i)]
        for number in numbers.unique().tolist():
            where = numbers == number
            assert batch.positions[row][where].tolist() == list(range(int(where.sum())))
            if number == len(documents):
                assert (tokens[where] == PAD).all()
                assert (batch.targets[row][where] == IGNORE).all()
                continue
            document = documents[number]
            assert tokens[where].tolist() == document.tokens.tolist()
            expected = [
                int(token) if trained else IGNORE
                for token, trained in zip(document.tokens[1:], document.trained[1:], strict=True)
            ]
            assert batch.targets[row][where].tolist() == [*expected, IGNORE]
            seen[int(document.tokens[0])] += 1
        assert number >= len(documents) - 1
    assert seen == Counter(int(d.tokens[0]) for i in range(len(stored)) for d in stored.item(i))
    assert rows.row_targets.sum() == (batch.targets != IGNORE).sum()
    assert rows.fill == pytest.approx(
        sum(len(d) for item in items for d in item) / (len(rows) * CONTEXT)
    )


def steps_of(datas, n):
    """Rows of the next optimiser steps, each step's sorted; all ranks together."""
    iterators = [iter(data.train_dataloader()) for data in datas]
    steps = []
    for _ in range(n):
        rows, step_tokens, targets = [], set(), 0
        for iterator in iterators:
            micro, accumulation = 0, 1
            while micro < accumulation:
                batch = next(iterator)
                accumulation, micro = batch.accumulation, micro + 1
                rows += [tuple(row) for row in batch.tokens.tolist()]
                step_tokens.add(batch.step_tokens)
                targets += int((batch.targets != IGNORE).sum())
        assert step_tokens == {targets}
        steps.append(sorted(rows))
        for data in datas:
            data.consume(batch.next_position)
    for iterator in iterators:
        iterator.close()
    return steps


class Shared:
    """As much of a trainer as the data ask for."""

    def __init__(self, rank, ranks):
        self.distributed_sampler_kwargs = {"rank": rank, "num_replicas": ranks}
        self.max_steps, self.state = -1, type("", (), {"fn": "fit"})


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_equals_uninterrupted(folder, tmp_path, workers):
    whole = steps_of([make_data(folder)], 9)
    first = make_data(folder, num_workers=workers)
    before = steps_of([first], 4)
    again = make_data(folder, micro_batch_tokens=128, num_workers=workers)
    again.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    assert before + steps_of([again], 5) == whole


def test_two_ranks_equal_one(folder):
    ranks = [make_data(folder) for _ in range(2)]
    for rank, data in enumerate(ranks):
        data.trainer = Shared(rank, 2)
    assert steps_of(ranks, 6) == steps_of([make_data(folder)], 6)


def test_an_epoch_reads_every_row_once_in_an_order_of_its_own(folder):
    data = make_data(folder, global_batch_tokens=CONTEXT, micro_batch_tokens=CONTEXT)
    n = len(data.rows)
    rows = [row for step in steps_of([data], 2 * n) for row in step]
    expected = sorted(map(tuple, data.rows.batch(range(n)).tokens.tolist()))
    assert sorted(rows[:n]) == sorted(rows[n:]) == expected
    assert rows[:n] != rows[n:]


def test_the_ledger_counts_what_was_read(folder):
    data = make_data(folder)
    n = len(data.rows)
    read = [row for step in steps_of([data], n // 8 + 2) for row in step]
    ledger = data.ledger()
    real = [token for row in read for token in row if token != PAD]
    mine = data.rows.sets[0].documents[-1]
    counted = ledger["data/tokens/a"] + ledger["data/tokens/b"]
    assert counted == len(real)
    assert ledger["data/epochs/a"] == ledger["data/tokens/a"] / mine
    assert 1 < ledger["data/epochs/a"] < 2.5


def test_a_skipped_stretch_is_no_step(folder):
    data = make_data(folder)
    steps_of([data], 3)
    data.skip(128, 256)
    assert data.loader.curriculum.history(data.loader.position)[-1].stop_step == 2
    assert data.loader.position == 3 * 128


def test_changed_data_are_noticed(folder, tmp_path):
    data = make_data(folder)
    steps_of([data], 1)
    state = data.state_dict()
    other = make_data(folder)
    other.use(("a", "b"), other.rows.sets, np.arange(70), [])
    with pytest.raises(ValueError, match="source 'items' has changed since"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"made with data.seed=6, the configuration says 7"):
        make_data(folder, seed=7).load_state_dict(state)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_held_out_rows_are_dealt_once(folder, ranks):
    data = make_data(folder)
    sets = [PackedRows([items], np.arange(37), CONTEXT, PAD) for items in data.rows.sets]
    dealt = [HeldOutItems(sets, Layout(rank, ranks, 40)) for rank in range(ranks)]
    assert len({len(batches) for batches in dealt}) == 1
    batches = [batch for rank in dealt for batch in rank]
    predicted = Counter(int(t) for b in batches for t in b.targets.flatten() if t != IGNORE)
    flat = [(items.tokens[items.trained], 1) for items in data.rows.sets]
    assert predicted == Counter(int(token) for tokens, _ in flat for token in tokens)
    assert all(not batch.exact for batch in batches)


def test_held_out_items_stop_at_the_limit(folder):
    data = make_data(folder, held_out_tokens=60)
    (rows,) = {id(rows): rows for rows, _ in data.val_dataloader()._batches}.values()
    lengths = data.rows.sets[1].lengths
    read = int(lengths[: len(rows.chosen)].sum())
    assert read <= 60 < read + int(lengths[len(rows.chosen)])
    assert sum(len(b.tokens) for b in data.test_dataloader()) >= sum(
        len(b.tokens) for b in data.val_dataloader()
    )


@given(st.integers(0, 50), st.floats(0, 3), st.integers(0, 5))
def test_weights_choose_whole_sets_and_a_share_more(count, weight, seed):
    chosen = choose(count, weight, seed)
    assert len(chosen) == round(weight * count)
    times = np.bincount(chosen, minlength=count) if count else np.zeros(0)
    assert all(int(weight) <= n <= int(weight) + 1 for n in times.tolist())
    assert (choose(count, weight, seed) == chosen).all()


def test_items_travel_by_their_place(folder):
    items = open_items(folder / "a")
    assert len(pickle.dumps(items)) < 500
    again = pickle.loads(pickle.dumps(items))
    assert again.digest == items.digest
    assert (again.tokens == items.tokens).all()
