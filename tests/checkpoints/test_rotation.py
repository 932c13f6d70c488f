"""Two stores in folders, one pass at a time: pins, claims, and what is read again."""

import shutil
from pathlib import Path

import pytest

from smol.checkpoints.fence import Fence, FencedError
from smol.checkpoints.retention import is_pinned, pin
from smol.checkpoints.rotation import Rotation
from smol.checkpoints.store import FsspecStore


@pytest.fixture
def local(tmp_path):
    return FsspecStore(tmp_path / "run/checkpoints")


@pytest.fixture
def remote(tmp_path):
    return FsspecStore(tmp_path / "safe/run")


def write(folder):
    (folder / "x").write_bytes(b"abc")


def steps(store):
    return [info.manifest.step for info in store.list()]


def begin(*stores, **kwargs):
    """A rotation without a thread: a pass is ``run_once``."""
    rotation = Rotation(*stores, **kwargs)
    rotation.fence.claim()
    return rotation


@pytest.mark.parametrize("where", ["local", "remote"])
def test_a_pin_in_either_store_keeps_the_remote_copy(local, remote, where):
    rotation = begin(local, remote)
    first = rotation.save(1, write, {})
    rotation.mirror.run_once()
    pin({"local": local, "remote": remote}[where], first.key)
    for step in (2, 3, 4):
        rotation.save(step, write, {})
        assert 1 in steps(local) or is_pinned(remote, first.key)
        rotation.mirror.run_once()
    rotation.mirror.prune_local()
    assert steps(local) == [4]  # the pin is in the store
    assert steps(remote) == [1, 3, 4]


def test_a_local_pin_stays_until_it_is_in_the_store(local, remote, monkeypatch):
    rotation = begin(local, remote)
    first = rotation.save(1, write, {})
    rotation.mirror.run_once()
    pin(local, first.key)

    def away():
        raise OSError("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(rotation.mirror.fence, "check", away)
        for step in (2, 3, 4):
            rotation.save(step, write, {})
            with pytest.raises(OSError, match="away"):
                rotation.mirror.run_once()
        assert steps(local) == [1, 3, 4]
    rotation.mirror.run_once()
    rotation.mirror.prune_local()
    assert steps(local) == [4]
    assert steps(remote) == [1, 3, 4]


def test_a_claim_after_the_store_was_deleted_is_not_taken_for_an_older_one(local):
    older, newer = Fence(local), Fence(local)
    older.claim()
    newer.claim()
    shutil.rmtree(local.root)
    newer.check()
    assert newer.number == older.number  # numbers begin anew
    with pytest.raises(FencedError, match="has taken over"):
        older.check()
    newer.check()


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("here", [False, True])
def test_what_was_resumed_from_here_is_not_read_again(
    local, remote, tmp_path, monkeypatch, mirrored, here
):
    _, resumed = (local.save(step, write, {}) for step in (1, 2))
    read = []
    monkeypatch.setattr(local, "is_sound", lambda info: not read.append(info.key))
    folder = Path(local.root) if here else tmp_path / "restored"
    rotation = begin(local, remote if mirrored else None, resumed=folder / resumed.key)
    rotation.save(3, write, {})
    assert steps(local) == [2, 3]
    assert read == ([] if here else [resumed.key])
