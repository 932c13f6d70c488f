"""The checkpoint callback: when it saves, what it keeps, what a resumed run is."""

import json
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning import Callback
from tiny import Bomb, Die, make_data, make_module, make_stages, make_trainer
from warm_python import python

from callbacks.checkpoint_rotation import CheckpointRotation
from callbacks.events import Events
from callbacks.fault_injection import Fault, FaultInjection
from smol.checkpoints.replicas import RemoteRuns
from smol.checkpoints.retention import is_pinned
from smol.checkpoints.rotation import Rotation
from smol.checkpoints.store import FsspecStore
from smol.errors import UserError
from smol.experiments import CSVLogger
from smol.runs import find_start, newest_checkpoint


def train(folder, sources, steps, *callbacks, resume=None, checkpoint=None, **kwargs):
    checkpoint = checkpoint or CheckpointRotation(every=3, keep=2)
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
        CheckpointRotation(keep=1)


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
    trainer = make_trainer(tmp_path, 9, callbacks=[CheckpointRotation(every=3)])
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

    monkeypatch.setattr("smol.checkpoints.together.write_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path, sources, 3)
    assert steps_kept(tmp_path) == []


def events(folder, *kinds):
    rows = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [(row["kind"], row["step"]) for row in rows if row["kind"] in kinds]


def test_mid_way_a_full_disk_is_an_event_and_the_run_goes_on(sources, tmp_path):
    fault = FaultInjection([Fault("full_disk", 4)])
    train(tmp_path, sources, 7, fault, Events(), checkpoint=CheckpointRotation(every=2))
    assert steps_kept(tmp_path) == [6, 7]
    assert [row for row in events(tmp_path, "save_failed") if row[1] in (4, 5)]
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {name for name in names if name.startswith(".")} == set()


class At(Callback):
    """Does something at a step, when it is half done."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == self.step:
            self.action()


def test_a_signal_and_a_file_ask_for_a_checkpoint(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("callbacks.parts.save_requests.LOOK_SECONDS", 0)
    numbers = signal.SIGUSR1, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    ask = At(2, lambda: os.kill(os.getpid(), signal.SIGUSR1)), At(5, (tmp_path / "save").touch)
    rotation = CheckpointRotation(every=0, keep=9)
    train(tmp_path, sources, 9, *ask, Events(), checkpoint=rotation)
    assert steps_kept(tmp_path) == [3, 6, 9]
    assert events(tmp_path, "saved") == [("saved", step) for step in (3, 6, 9)]
    assert not (tmp_path / "save").exists()
    assert [signal.getsignal(number) for number in numbers] == before


def test_what_was_asked_for_is_not_forgotten_when_it_fails(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("callbacks.parts.save_requests.LOOK_SECONDS", 0)
    monkeypatch.setattr("callbacks.parts.save_requests.RETRY_SECONDS", 0)
    real, fails, seen = Rotation.save, {3, 4, 7, 8}, []

    def save(self, step, *args):
        seen.append((step, (tmp_path / "save").exists()))
        if step in fails:
            raise OSError(28, "No space left on device")
        return real(self, step, *args)

    monkeypatch.setattr(Rotation, "save", save)
    ask = At(2, lambda: os.kill(os.getpid(), signal.SIGUSR1)), At(6, (tmp_path / "save").touch)
    train(tmp_path, sources, 11, *ask, checkpoint=CheckpointRotation(every=0, keep=9))
    assert steps_kept(tmp_path) == [5, 9, 11]
    assert seen == [(s, s in (7, 8, 9)) for s in (3, 4, 5, 7, 8, 9, 11)]


def test_after_a_failure_some_time_passes(sources, tmp_path, monkeypatch):
    steps = []

    def save(self, step, *args):
        steps.append(step)
        if step < 9:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Rotation, "save", save)
    ask = At(2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    train(tmp_path, sources, 9, ask, checkpoint=CheckpointRotation(every=0, minutes=1e-9))
    assert steps == [1, 9]


def test_minutes_between_checkpoints(sources, tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 20))  # each look at it takes 20 seconds
    monkeypatch.setattr("callbacks.parts.save_requests.time.monotonic", lambda: next(clock))
    train(tmp_path, sources, 12, checkpoint=CheckpointRotation(every=0, minutes=1.5, keep=99))
    kept = steps_kept(tmp_path)
    assert len(kept) >= 3
    assert len({b - a for a, b in pairwise(kept[:-1])}) == 1
    assert kept[-1] == 12


def test_the_end_of_a_stage_is_saved_and_pinned(sources, tmp_path):
    stages = make_stages(
        sources, one={"start_step": 0, "cats": 1.0}, two={"start_step": 4, "dogs": 1.0}
    )
    trainer = make_trainer(tmp_path, 12, callbacks=[CheckpointRotation(every=3)])
    trainer.fit(make_module(), make_data(sources, stages, micro_batch_tokens=128))
    store = FsspecStore(tmp_path / "checkpoints")
    assert steps_kept(tmp_path) == [4, 9, 12]
    assert [is_pinned(store, info.key) for info in store.list()] == [True, False, False]


def test_the_end_of_a_stage_that_cannot_be_saved_is_pinned_later(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("callbacks.parts.save_requests.RETRY_SECONDS", 0)
    stages = make_stages(
        sources, one={"start_step": 0, "cats": 1.0}, two={"start_step": 4, "dogs": 1.0}
    )
    fault, rotation = FaultInjection([Fault("full_disk", 4)]), CheckpointRotation(every=0, keep=9)
    trainer = make_trainer(tmp_path, 9, callbacks=[fault, rotation])
    trainer.fit(make_module(), make_data(sources, stages, micro_batch_tokens=128))
    store = FsspecStore(tmp_path / "checkpoints")
    kept = [(info.manifest.step, is_pinned(store, info.key)) for info in store.list()]
    assert kept == [(5, True), (9, False)]


SCRIPT = """
import sys, os, signal
from pathlib import Path
from tiny import make_data, make_module, make_trainer
from lightning import Callback
from callbacks.checkpoint_rotation import CheckpointRotation
from callbacks.events import Events

class Term(Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

folder, sources = map(Path, sys.argv[1:3])
trainer = make_trainer(folder, 9, callbacks=[Term(), Events(), CheckpointRotation(every=0)])
trainer.fit(make_module(), make_data(sources))
"""


def test_sigterm_saves_and_ends_with_status_143(sources, tmp_path):
    done = python("-c", SCRIPT, tmp_path, sources)
    assert done.returncode == 143, done.stderr
    assert steps_kept(tmp_path) == [5]
    assert events(tmp_path, "terminated") == [("terminated", 5)]


@pytest.mark.slow
def test_ranks_hear_of_a_signal_at_the_same_step(sources, tmp_path):
    done = python(Path(__file__).with_name("rotation_ranks.py"), sources, tmp_path, ranks=2)
    assert done.returncode == 143, done.stderr[-3000:]
    assert steps_kept(tmp_path / "run") == [6]
    assert events(tmp_path / "run", "saved", "terminated") == [
        *(("saved", 2), ("saved", 6), ("terminated", 6))
    ]
    remote = RemoteRuns(str(tmp_path / "safe"))
    assert [info.manifest.world_size for info in remote.of("run").list()] == [2, 2]


def test_a_run_whose_folder_was_deleted_goes_on_from_the_store(sources, tmp_path):
    """The same line restarts it, and the weights are those of a run that nothing happened to."""
    remote = RemoteRuns(str(tmp_path / "safe"))
    expected = train(tmp_path / "whole", sources, 9)

    def rotation():
        return CheckpointRotation(every=3, store=str(tmp_path / "safe"))

    class DieOnceUploaded(Bomb):  # what dies sooner uploads nothing
        def on_before_optimizer_step(self, trainer, module, optimizer):
            if trainer.global_step == self.step:
                wait_for(lambda: steps_kept_in(remote) == [3])
            super().on_before_optimizer_step(trainer, module, optimizer)

    run = tmp_path / "run"
    with pytest.raises(Die):
        train(run, sources, 9, DieOnceUploaded(5), Events(), checkpoint=rotation())
    shutil.rmtree(run)
    start = find_start(run, remote=remote)
    assert start.lineage is None
    module = train(run, sources, 9, Events(), resume=start.checkpoint, checkpoint=rotation())
    for a, b in zip(expected.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert steps_kept(run) == [9]
    assert steps_kept_in(remote) == [3, 6, 9]  # it was resumed from 3
    assert [kind for kind, _ in events(run, "saved", "uploaded")].count("uploaded") == 2


def steps_kept_in(remote):
    return [info.manifest.step for info in remote.of("run").list()]


def wait_for(condition):
    import time

    until = time.monotonic() + 20
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    assert condition()


def test_an_unreachable_store_stops_nothing_and_is_told(sources, tmp_path):
    (tmp_path / "safe").write_text("a file where a folder should be")
    rotation = CheckpointRotation(every=2, store=str(tmp_path / "safe"), patience=0.2)
    logger = CSVLogger(str(tmp_path / "run"))
    train(tmp_path / "run", sources, 8, Events(), checkpoint=rotation, logger=logger)
    assert steps_kept(tmp_path / "run") == [6, 8]
    assert len(events(tmp_path / "run", "upload_failed")) >= 2  # the first attempt, and the end
    assert float(logger.rows()[-1]["checkpoint/seconds_stalled"]) > 0


def test_the_age_of_what_is_safe_is_logged(sources, tmp_path):
    rotation = CheckpointRotation(every=2, store=str(tmp_path / "safe"))
    logger = CSVLogger(str(tmp_path / "run"))

    class Wait(Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 4:
                wait_for(lambda: len(RemoteRuns(str(tmp_path / "safe")).of("run").list()) >= 1)

    train(tmp_path / "run", sources, 6, Wait(), checkpoint=rotation, logger=logger)
    ages = [row.get("checkpoint/age_of_durable_seconds") for row in logger.rows()]
    assert not ages[0]
    assert 0 <= float(ages[-1]) < 60


def test_refusals():
    with pytest.raises(UserError, match="minutes is 0, expected more than 0"):
        CheckpointRotation(minutes=0)
    with pytest.raises(UserError, match="keep_every is 0"):
        CheckpointRotation(keep_every=0)
