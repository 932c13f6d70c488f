"""Where a run starts from."""

from pathlib import Path

import pytest
import torch

from smol.checkpoints.format import write_checkpoint
from smol.checkpoints.replicas import RemoteRuns
from smol.checkpoints.store import FsspecStore
from smol.errors import TemporaryError, UserError
from smol.runs import find_start


def save(run: Path, step: int) -> Path:
    store = FsspecStore(run / "checkpoints")
    checkpoint = {"state_dict": {"decoder.w": torch.full((2,), float(step))}, "global_step": step}
    info = store.save(step, lambda folder: write_checkpoint(folder, checkpoint), {})
    return store.load_path(info)


def test_nothing_there_starts_from_scratch(tmp_path):
    start = find_start(tmp_path / "stage1")
    assert start.checkpoint is None
    assert start.weights is None


def test_a_run_goes_on_from_its_own_newest_checkpoint_whatever_it_began_with(tmp_path):
    save(tmp_path / "stage1", 100)
    save(tmp_path / "stage2", 120)
    newest = save(tmp_path / "stage2", 150)
    start = find_start(tmp_path / "stage2", continues="stage1")
    assert start.checkpoint == newest
    assert str(newest) in start.reason
    assert find_start(tmp_path / "stage2", "scratch", continues="stage1").checkpoint is None
    sft = find_start(tmp_path / "sft", "scratch", init_from="stage1")
    assert sft.checkpoint is None
    assert sft.weights is not None


def test_continues_takes_all_and_init_from_takes_weights(tmp_path):
    newest = save(tmp_path / "stage1", 100)
    assert find_start(tmp_path / "stage2", continues="stage1").checkpoint == newest
    start = find_start(tmp_path / "stage2", init_from="stage1")
    assert start.weights == newest
    assert start.checkpoint is None
    assert find_start(tmp_path / "stage2", init_from=str(newest)).weights == newest


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path):
    older = save(tmp_path / "stage1", 100)
    newer = save(tmp_path / "stage1", 200)
    data = bytearray((newer / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (newer / "model.safetensors").write_bytes(data)
    assert find_start(tmp_path / "stage1").checkpoint == older


def test_each_damaged_checkpoint_is_told_once(tmp_path, caplog):
    older, newer = (save(tmp_path / "stage1", step) for step in (100, 200))
    (newer / "manifest.json").write_text("{}")
    assert find_start(tmp_path / "stage1").checkpoint == older
    assert [record.getMessage().split("/")[-1] for record in caplog.records] == [
        "manifest.json is damaged: its SHA-256 is not in COMMITTED"
    ]


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json", "COMMITTED"])
def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew_in_silence(tmp_path, file):
    only = save(tmp_path / "stage1", 100)
    (only / file).write_bytes(b"")
    with pytest.raises(UserError, match="all 1 checkpoints .* are damaged; restore one"):
        find_start(tmp_path / "stage1")


@pytest.mark.parametrize("how", ["continues", "init_from"])
def test_a_missing_predecessor_is_one_line_with_the_command_that_makes_it(tmp_path, how):
    with pytest.raises(UserError) as error:
        find_start(tmp_path / "stage2", **{how: "stage1"})
    assert "'stage1' has no checkpoint" in str(error.value)
    assert "python src/train.py fit --config configs/stage1.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["continues", "init_from"])
def test_a_folder_without_a_checkpoint_is_one_line(tmp_path, how):
    with pytest.raises(UserError, match="/none has neither model.safetensors nor a run's") as error:
        find_start(tmp_path / "stage2", **{how: f"{tmp_path}/none"})
    assert "\n" not in str(error.value)


def test_a_misspelt_predecessor_is_named(tmp_path):
    save(tmp_path / "stage1", 1)
    with pytest.raises(UserError, match="Did you mean 'stage1'"):
        find_start(tmp_path / "stage2", continues="stagel")


def test_what_does_not_train_needs_something_to_start_from(tmp_path):
    with pytest.raises(UserError, match="'stage1' has no checkpoint.*train it first"):
        find_start(tmp_path / "stage1", training=False)
    with pytest.raises(UserError, match="is not there"):
        find_start(tmp_path / "stage1", tmp_path / "nowhere")


class Away:
    """A store that is not there, from the call of ``method`` on."""

    def __init__(self, root, method):
        store = FsspecStore(root)
        self.root, self.is_local, self.verify = store.root, True, store.verify
        self.list, self.marked, self.load_path = store.list, store.marked, store.load_path
        setattr(self, method, self.refuse)

    def refuse(self, *_):
        raise ConnectionError("no route to host")


@pytest.mark.parametrize("method", ["list", "verify"])
def test_a_store_that_is_away_may_come_back(tmp_path, monkeypatch, method):
    save(tmp_path / "safe/stage1", 100)
    store = Away(tmp_path / "safe/stage1/checkpoints", method)
    monkeypatch.setattr(RemoteRuns, "of", lambda *_: store)
    monkeypatch.setattr("smol.checkpoints.replicas.time.sleep", lambda _: None)
    with pytest.raises(TemporaryError, match="cannot be read: ConnectionError: no route") as error:
        find_start(tmp_path / "stage1", remote=RemoteRuns("s3://bucket"))
    assert "\n" not in str(error.value)
