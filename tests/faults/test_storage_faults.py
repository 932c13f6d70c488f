"""Training with a store that fails at random and a folder that somebody deletes."""

import os
import shutil
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from faulty_proxy import FaultyProxy
from lightning import Callback
from object_store import BUCKET
from tiny import make_data, make_module, make_trainer

from callbacks import CheckpointRotation
from callbacks.events import Events
from smol.checkpoints.replicas import RemoteRuns
from smol.experiments import CSVLogger
from smol.runs import find_start

SEEDS = range(20 if "DRILLS" in os.environ else 1)
FAULTS = (503, 500, 403, 400, "cut", "cut_body", "flip", "flip_up", "truncate_up")
SHARE = 0.05  # of the requests go wrong
STEPS = 24


class Delete(Callback):
    """Deletes the run folder in the middle of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == self.step:
            shutil.rmtree(trainer.default_root_dir)


class Hurry(Callback):
    """Lets the mirror try again at once, and gives it time between steps that need none."""

    def on_train_batch_start(self, trainer, *args):
        (rotation,) = (c for c in trainer.callbacks if isinstance(c, CheckpointRotation))
        mirror = rotation._rotation.mirror
        mirror.pause = 0.01, 0.05
        mirror.flush(0.1)


def train(folder, sources, *callbacks, steps=STEPS, resume=None, **rotation):
    checkpoint = CheckpointRotation(every=3, **rotation)
    trainer = make_trainer(
        folder, steps, callbacks=[*callbacks, Events(), checkpoint], logger=CSVLogger(str(folder))
    )
    module = make_module()
    torch.manual_seed(0)
    trainer.fit(module, make_data(sources), ckpt_path=resume)
    return module


def let_finish(proxy):
    """Let the mirrors of runs that have ended remove what they were about to."""
    proxy.fault = lambda request: None
    for thread in threading.enumerate():
        if thread.name == "checkpoint mirror":
            thread.join(60)


@pytest.mark.s3
@pytest.mark.timeout(3600)
def test_a_store_that_fails_at_random_and_a_folder_that_is_deleted_change_no_weight(
    sources, s3, tmp_path, record_property
):
    """Half way the run ends, its folder is deleted, and it goes on from the store."""
    expected = train(tmp_path / "whole", sources)
    struck = Counter()
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        proxy = FaultyProxy(s3.port)
        options = s3.storage_options | {
            "client_kwargs": {"endpoint_url": proxy.url},
            "config_kwargs": {"retries": {"max_attempts": 0}, "read_timeout": 2},
        }
        safe = RemoteRuns(f"s3://{BUCKET}/{tmp_path.name}/{seed}", options)
        store = {"store": safe.url, "storage_options": options}

        def fault(request, rng=rng):
            if rng.random() > SHARE:
                return None
            kind = FAULTS[rng.integers(len(FAULTS))]
            struck[str(kind)] += 1
            return kind

        proxy.fault = fault
        folder = tmp_path / f"run-{seed}"
        half = int(rng.integers(9, STEPS - 3))
        train(folder, sources, Delete(int(rng.integers(1, half))), Hurry(), steps=half, **store)
        let_finish(proxy)
        shutil.rmtree(folder)
        start = find_start(folder, remote=safe)
        assert start.checkpoint.name.startswith(f"step-{half:08d}")
        proxy.fault = fault
        module = train(folder, sources, Hurry(), resume=start.checkpoint, **store)
        for one, other in zip(expected.parameters(), module.parameters(), strict=True):
            assert torch.equal(one, other)
        let_finish(proxy)
        remote = safe.of(folder.name)
        infos = remote.list()
        assert len(infos) >= 2
        assert infos[-1].manifest.step == STEPS
        for info in infos:
            remote.verify(info)
        proxy.stop()
    record_property("seeds", len(SEEDS))
    record_property("requests that went wrong", dict(struck))
