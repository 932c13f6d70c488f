"""The checkpoint callback: when it saves, what it keeps, what a resumed run is."""

import pytest
import torch
from lightning import Callback
from tiny import make_data, make_module, make_trainer

from callbacks import Checkpoint
from smol.checkpoints.store import FsspecStore
from smol.errors import UserError
from smol.experiments import CSVLogger
from smol.runs import find_start, newest_checkpoint


def train(folder, sources, steps, *callbacks, resume=None, checkpoint=None, **kwargs):
    checkpoint = checkpoint or Checkpoint(every=3, keep=2)
    trainer = make_trainer(folder, steps, callbacks=[*callbacks, checkpoint], **kwargs)
    module = make_module()
    data = make_data(sources, micro_batch_tokens=128)
    trainer.fit(module, data, ckpt_path=resume)
    return module


def steps_kept(folder):
    return [info.manifest.step for info in FsspecStore(folder / "checkpoints").list()]


def test_saves_at_regular_steps_and_at_the_end_and_keeps_the_newest(sources, tmp_path):
    train(tmp_path, sources, 10)
    assert steps_kept(tmp_path) == [9, 10]
    (first, _) = FsspecStore(tmp_path / "checkpoints").list()
    assert first.manifest.tokens == 9 * 256
    assert first.manifest.run_name == tmp_path.name


def test_does_not_delete_what_it_was_resumed_from(sources, tmp_path):
    train(tmp_path, sources, 3)
    resumed = newest_checkpoint(tmp_path)
    train(tmp_path, sources, 15, resume=resumed)
    assert steps_kept(tmp_path) == [3, 12, 15]


def test_nothing_is_saved_twice(sources, tmp_path):
    train(tmp_path, sources, 6)
    train(tmp_path, sources, 6, resume=newest_checkpoint(tmp_path))
    assert steps_kept(tmp_path) == [3, 6]


class Die(Exception):
    pass


class Bomb(Callback):
    """Ends the run in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == self.step:
            raise Die


@pytest.mark.parametrize("dies_at", [4, 6, 7])
def test_a_run_that_died_goes_on_as_if_it_had_not(sources, tmp_path, dies_at):
    options = {"limit_val_batches": 1.0, "val_check_interval": 3}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = train(whole, sources, 9, logger=CSVLogger(str(whole)), **options)
    with pytest.raises(Die):
        train(broken, sources, 9, Bomb(dies_at), logger=CSVLogger(str(broken)), **options)
    resume = newest_checkpoint(broken)
    module = train(broken, sources, 9, resume=resume, logger=CSVLogger(str(broken)), **options)
    for a, b in zip(expected.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert CSVLogger(str(whole)).rows() == CSVLogger(str(broken)).rows()


def test_one_checkpoint_alone_is_refused():
    with pytest.raises(UserError, match="keep is 1; at least 2"):
        Checkpoint(keep=1)


def test_damaged_ones_neither_count_nor_cost_a_good_one(sources, tmp_path):
    train(tmp_path, sources, 6)
    good = newest_checkpoint(tmp_path)
    train(tmp_path, sources, 12, resume=good)
    assert steps_kept(tmp_path) == [6, 9, 12]
    for info in FsspecStore(tmp_path / "checkpoints").list()[1:]:
        path = tmp_path / "checkpoints" / info.key / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert newest_checkpoint(tmp_path) == good
    start = find_start(tmp_path)
    assert start.lineage == 1  # what is saved now is newer than the damaged ones
    trainer = make_trainer(tmp_path, 9, callbacks=[Checkpoint(every=3)])
    module = make_module()
    module.lineage = start.lineage
    trainer.fit(module, make_data(sources, micro_batch_tokens=128), ckpt_path=start.checkpoint)
    newest = newest_checkpoint(tmp_path)
    assert newest.name.startswith("step-00000009")
    assert good.is_dir()


def test_a_save_that_is_killed_leaves_nothing_behind(sources, tmp_path, monkeypatch):
    """The next save takes away what an interrupted one has left."""
    leftover = tmp_path / "checkpoints/.staging-step-00000003-00000000"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    train(tmp_path, sources, 3)
    assert not leftover.exists()


def test_a_full_disk_is_told_on_every_rank(sources, tmp_path, monkeypatch):
    def full(folder, checkpoint):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("callbacks.checkpoint.write_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path, sources, 3)
    assert steps_kept(tmp_path) == []
