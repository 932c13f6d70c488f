"""The store: what counts as a checkpoint, damage, order, leftovers, on disk and behind a URL."""

import hashlib
import logging
import math
import os
import subprocess
import sys
import textwrap
import uuid

import fsspec
import pytest
import torch

from smol.checkpoints.format import read_checkpoint, write_checkpoint
from smol.checkpoints.store import FsspecStore, NonFiniteError, verify_files
from smol.errors import UserError


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    if request.param == "local":
        return FsspecStore(tmp_path / "store")
    return FsspecStore(f"memory://{uuid.uuid4().hex}/run", cache=tmp_path / "cache")


def writer(value=1.0):
    def write(folder):
        write_checkpoint(folder, {"state_dict": {"w": torch.full((64,), value)}, "step": 3})

    return write


def damage(store, info, name, edit):
    path = f"{store.root}/{info.key}/{name}"
    content = store.fs.cat_file(path)
    store.fs.rm_file(path)
    if edit is not None:
        store.fs.pipe_file(path, edit(content))


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_save_list_load(store):
    assert store.list() == []
    assert store.latest_verified() is None
    metadata = {"tokens": 12, "lineage": 1, "run_name": "r", "parent": "p", "world_size": 2}
    saved = store.save(120, writer(), metadata | {"config_digest": "abc"})
    assert saved.key.startswith("step-00000120-")
    assert store.list() == [saved]
    assert store.latest_verified() == saved
    manifest = saved.manifest
    assert (manifest.step, manifest.tokens, manifest.lineage, manifest.parent) == (120, 12, 1, "p")
    assert manifest.finite
    assert set(manifest.files) == {"model.safetensors", "state.json"}
    folder = store.load_path(saved)
    assert torch.equal(read_checkpoint(folder)["state_dict"]["w"], torch.ones(64))
    assert store.load_path(saved) == folder
    assert sorted(os.listdir(folder)) == [
        *("COMMITTED", "manifest.json", "model.safetensors", "state.json")
    ]


def test_order_is_lineage_then_step_whatever_the_clock_says(store):
    expected = [(0, 5), (0, 900), (1, 7), (2, 6)]
    for lineage, step in [(2, 6), (0, 900), (1, 7), (0, 5)]:
        store.save(step, writer(), {"lineage": lineage})
    assert [(i.manifest.lineage, i.manifest.step) for i in store.list()] == expected
    assert store.latest_verified().manifest.step == 6


def test_the_same_step_twice_gets_two_keys(store):
    first, second = (store.save(5, writer(), {}) for _ in range(2))
    assert first.key != second.key
    assert len(store.list()) == 2


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("model.safetensors", flip, "model.safetensors is damaged: its SHA-256"),
        ("model.safetensors", lambda content: content[:-1], "is damaged: it has"),
        ("state.json", None, "state.json is missing"),
        ("manifest.json", flip, "manifest.json is damaged"),
        ("manifest.json", None, "no manifest.json"),
        ("COMMITTED", flip, "manifest.json is damaged"),
        ("COMMITTED", None, "no COMMITTED"),
    ],
)
def test_damage_is_named_and_passed_over(store, caplog, name, edit, message):
    good = store.save(1, writer(), {})
    bad = store.save(2, writer(2.0), {})
    damage(store, bad, name, edit)
    with pytest.raises(UserError, match=message) as error:
        store.verify(bad)
    assert "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        assert store.latest_verified() == good
    if name != "COMMITTED" or edit is not None:
        assert len(caplog.records) == 1
        assert "\n" not in caplog.text.strip()


def test_a_damaged_download_is_not_used(tmp_path):
    store = FsspecStore(f"memory://{uuid.uuid4().hex}/run", cache=tmp_path)
    info = store.save(1, writer(), {})
    damage(store, info, "model.safetensors", flip)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        store.load_path(info)
    assert not list(tmp_path.iterdir())


def test_non_finite_is_refused_and_leaves_nothing(store):
    with pytest.raises(NonFiniteError, match=r"is refused: 'w'"):
        store.save(7, writer(math.nan), {})
    assert store.list() == []
    assert not store.fs.exists(store.root) or not store.fs.ls(store.root)


def test_delete_takes_the_marker_first(store, monkeypatch):
    info = store.save(1, writer(), {})

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.fs, "rm", crash)
        with pytest.raises(KeyboardInterrupt):
            store.delete(info)
    assert store.list() == []
    assert store.fs.exists(f"{store.root}/{info.key}/model.safetensors")
    other = store.save(2, writer(), {})
    assert not store.fs.exists(f"{store.root}/{info.key}")
    store.delete(other)
    assert store.list() == []


def test_foreign_files_are_left_alone(store):
    store.save(1, writer(), {})
    store.fs.pipe_file(f"{store.root}/notes.txt", b"mine")
    store.save(2, writer(), {})
    assert len(store.list()) == 2
    assert store.fs.cat_file(f"{store.root}/notes.txt") == b"mine"


def test_a_killed_save_leaves_no_checkpoint(tmp_path):
    """The process dies at every write in turn, without unwinding; then the next save cleans up."""
    script = textwrap.dedent("""
        import os, sys
        import torch
        from smol.checkpoints import store as module
        from smol.checkpoints.format import write_checkpoint
        real = os.fsync
        def fsync(descriptor):
            global calls
            calls += 1
            if calls == fatal:
                os._exit(9)
            real(descriptor)
        os.fsync = fsync
        write = lambda folder: write_checkpoint(folder, {"state_dict": {"w": torch.ones(4)}})
        for fatal in range(1, 99):
            calls = 0
            if os.fork() == 0:
                module.FsspecStore(sys.argv[1] + f"/{fatal}").save(1, write, {})
                os._exit(0)
            if os.waitstatus_to_exitcode(os.wait()[1]) == 0:
                break
        print(fatal)
    """)
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    crashes = int(result.stdout) - 1
    assert crashes >= 8
    for fatal in range(1, crashes + 1):
        store = FsspecStore(tmp_path / str(fatal))
        infos = store.list()
        # The last flush follows the rename: by then the checkpoint is whole.
        assert len(infos) == (fatal == crashes)
        for info in infos:
            store.verify(info)
        store.save(2, writer(), {})
        assert store.latest_verified().manifest.step == 2
        assert len(os.listdir(tmp_path / str(fatal))) == len(infos) + 1


def test_the_marker_is_uploaded_last_and_only_after_reading_back(tmp_path, monkeypatch):
    store = FsspecStore(f"memory://{uuid.uuid4().hex}/run", cache=tmp_path)
    uploaded = []
    real = type(store.fs).put_file

    def put_file(self, source, target, **kwargs):
        uploaded.append(target.rpartition("/")[2])
        real(self, source, target, **kwargs)
        if uploaded[-1] == "model.safetensors":
            self.pipe_file(target, flip(self.cat_file(target)))

    monkeypatch.setattr(type(store.fs), "put_file", put_file)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        store.save(1, writer(), {})
    assert uploaded == ["model.safetensors", "state.json", "manifest.json"]
    assert store.list() == []


def test_a_manifest_of_another_kind_is_refused(tmp_path):
    local = fsspec.filesystem("file")
    store = FsspecStore(tmp_path / "store")
    info = store.save(1, lambda folder: (folder / "a").write_text("x") and None, {})
    verify_files(local, info.location, info.manifest)
    folder = tmp_path / "store" / info.key
    text = (folder / "manifest.json").read_text()
    for old, new, message in [('"a"', '"../a"', "outside"), ('"tokens"', '"coins"', "version")]:
        changed = text.replace(old, new)
        (folder / "manifest.json").write_text(changed)
        (folder / "COMMITTED").write_text(hashlib.sha256(changed.encode()).hexdigest())
        with pytest.raises(UserError, match=message):
            store.verify(info)
