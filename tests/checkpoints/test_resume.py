"""A run starts from the newest checkpoint that is whole, here or in the store."""

import os
import shutil

import pytest
import torch

from smol.checkpoints.format import read_checkpoint, write_checkpoint
from smol.checkpoints.replicas import RemoteRuns
from smol.checkpoints.store import FsspecStore
from smol.errors import UserError
from smol.runs import find_start


@pytest.fixture
def remote(tmp_path):
    return RemoteRuns(f"memory://{tmp_path}/safe")


def save(store, step, **metadata):
    content = {"state_dict": {"w": torch.full((9,), float(step))}, "global_step": step}
    return store.save(step, lambda folder: write_checkpoint(folder, content), metadata)


def step_of(path):
    return read_checkpoint(path)["global_step"]


def test_the_newest_of_both_places(tmp_path, remote):
    run = tmp_path / "one"
    save(FsspecStore(run / "checkpoints"), 5)
    save(remote.of("one"), 7)
    start = find_start(run, remote=remote)
    assert step_of(start.checkpoint) == 7
    assert start.checkpoint.parent == run / "checkpoints"
    assert start.lineage is None
    save(FsspecStore(run / "checkpoints"), 3, lineage=1)
    assert step_of(find_start(run, "auto", remote=remote).checkpoint) == 3


def test_the_store_alone_starts_a_run_whose_folder_is_gone(tmp_path, remote):
    for step in (1, 2):
        save(remote.of("one"), step)
    assert step_of(find_start(tmp_path / "one", "latest", remote=remote).checkpoint) == 2
    shutil.rmtree(tmp_path / "one")
    assert step_of(find_start(tmp_path / "two", continues="one", remote=remote).checkpoint) == 2
    assert step_of(find_start(tmp_path / "two", init_from="one", remote=remote).weights) == 2


def test_falls_back_over_both_places_and_takes_another_path_then(tmp_path, remote):
    run = tmp_path / "one"
    save(FsspecStore(run / "checkpoints"), 5)
    newest = save(remote.of("one"), 7)
    path = f"{remote.of('one').root}/{newest.key}/model.safetensors"
    fs = remote.of("one").fs
    fs.pipe_file(path, fs.cat_file(path)[:-1])
    start = find_start(run, remote=remote)
    assert step_of(start.checkpoint) == 5
    assert start.lineage == 1


def test_an_unreachable_store_counts_as_perhaps_newer(tmp_path, monkeypatch):
    monkeypatch.setattr("smol.checkpoints.replicas.time.sleep", lambda seconds: None)
    (tmp_path / "file").write_text("no folder")
    remote = RemoteRuns(str(tmp_path / "file"))
    run = tmp_path / "one"
    with pytest.raises(UserError, match="cannot be read: .*begin anew with --ckpt_path scratch"):
        find_start(run, remote=remote)
    save(FsspecStore(run / "checkpoints"), 5)
    start = find_start(run, remote=remote)
    assert (step_of(start.checkpoint), start.lineage) == (5, 1)


def test_a_checkpoint_by_its_url_and_the_newest_of_a_url(tmp_path, remote):
    first, second = (save(remote.of("other"), step) for step in (1, 2))
    run = tmp_path / "one"
    assert step_of(find_start(run, f"{remote.url}/other").checkpoint) == 2
    assert step_of(find_start(run, f"{remote.url}/other/{first.key}").checkpoint) == 1
    assert find_start(run).checkpoint is None  # another run's is none of its own
    remote.of("other").delete(second)
    assert step_of(find_start(run, f"{remote.url}/other/").checkpoint) == 1
    with pytest.raises(UserError, match="is not there, or damaged; expected the URL"):
        find_start(run, f"{remote.url}/nobody")


def test_latest_must_be_there_and_auto_need_not(tmp_path, remote):
    assert find_start(tmp_path / "one", "auto", remote=remote).checkpoint is None
    with pytest.raises(UserError, match="'one' has no checkpoint.*type --ckpt_path auto"):
        find_start(tmp_path / "one", "latest", remote=remote)


def test_processes_that_download_together_all_get_it(tmp_path):
    remote = RemoteRuns(str(tmp_path / "safe"))
    save(remote.of("one"), 3)

    class Far(type(remote)):
        def of(self, run, cache=None):
            store = super().of(run, cache)
            store.is_local, store._work = False, cache
            return store

    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            status = 1
            try:
                far = Far(remote.url)
                status = int(step_of(find_start(tmp_path / "one", remote=far).checkpoint) != 3)
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert len(FsspecStore(tmp_path / "one/checkpoints").list()) == 1
