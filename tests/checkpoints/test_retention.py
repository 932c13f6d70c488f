"""Which checkpoints may go, for all histories."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smol.checkpoints.format import write_checkpoint
from smol.checkpoints.retention import Retention, is_pinned, pin, unpin
from smol.checkpoints.store import CheckpointInfo, FsspecStore, Manifest
from smol.errors import UserError

places = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=14)


def make(places):
    return [
        CheckpointInfo(f"key-{i:02d}", "", Manifest(step, {}, True, "", lineage=lineage))
        for i, (lineage, step) in enumerate(places)
    ]


def place(info):
    return info.manifest.lineage, info.manifest.step, info.key


@given(places, st.integers(2, 5), st.none() | st.integers(1, 7), st.data())
def test_what_goes(places, keep, keep_every, data):
    infos = make(places)
    subset = st.sets(st.sampled_from(infos).map(lambda info: info.key)) if infos else st.just(set())
    sound, protected = data.draw(subset), data.draw(subset)
    gone = Retention(keep, keep_every).removable(
        infos, lambda info: info.key in sound, lambda info: info.key in protected
    )
    stays = [info for info in infos if info not in gone]
    good = sorted((info for info in infos if info.key in sound), key=place)
    newest = good[-keep:]
    # The newest sound ones stay, and so does everything newer than the oldest of them.
    assert all(info in stays for info in newest)
    assert all(place(info) < place(newest[0]) for info in gone)
    assert not gone or len(newest) == keep
    # So does what must, whatever its age.
    assert not [info for info in gone if info.key in protected]
    assert not [info for info in gone if keep_every and info.manifest.step % keep_every == 0]
    # And nothing else does.
    for info in stays:
        lasts = keep_every is not None and info.manifest.step % keep_every == 0
        old = len(newest) == keep and len(infos) > keep and place(info) < place(newest[0])
        assert not old or lasts or info.key in protected
    assert gone == sorted(gone, key=place)


@given(places, st.integers(2, 4))
def test_deleting_one_after_the_other_changes_no_verdict(places, keep):
    """A deletion that is interrupted is gone on with by the next start."""
    infos = make(places)
    rule = Retention(keep)
    gone = rule.removable(infos, lambda info: True)
    for i, info in enumerate(gone):
        left = [other for other in infos if other not in gone[:i]]
        assert rule.removable(left, lambda info: True)[0] == info


def test_nothing_is_verified_where_nothing_can_go():
    Retention(2).removable(make([(0, 1), (0, 2)]), pytest.fail)
    asked = []
    infos = make([(0, step) for step in range(9)])
    Retention(3).removable(infos, lambda info: asked.append(info) or True)
    assert [info.manifest.step for info in asked] == [8, 7, 6]


def test_refusals():
    with pytest.raises(UserError, match="keep is 1; at least 2"):
        Retention(1)
    with pytest.raises(UserError, match="keep_every is 0, expected 1 or more"):
        Retention(2, 0)


def test_a_pin_changes_nothing_of_the_checkpoint(tmp_path):
    store = FsspecStore(tmp_path)
    info = store.save(1, lambda folder: write_checkpoint(folder, {"global_step": 1}), {})
    assert not is_pinned(store, info.key)
    for _ in range(2):
        pin(store, info.key)
        assert is_pinned(store, info.key)
    store.verify(info)
    assert store.list() == [info]
    for _ in range(2):
        unpin(store, info.key)
        assert not is_pinned(store, info.key)
