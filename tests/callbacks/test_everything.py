"""All callbacks at once: they change nothing, and a restart does not either."""

import json

import pytest
import torch
from tiny import Bomb, Die, make_data, make_module, make_stages, make_trainer

import callbacks
from callbacks import (
    CheckpointRotation,
    ContextLengthSchedule,
    EvalLoss,
    Events,
    HardwareMonitor,
    NaNRollback,
    ProgressLine,
    RunReport,
    SampleText,
    SourceLedger,
    Throughput,
    WarmupCheck,
    ZLossMonitor,
)
from smol.experiments import CSVLogger
from smol.runs import newest_checkpoint

# Faults change a run on purpose, predictions are of another command, and the evaluations have tests
# of their own, since they take their time.
NOT_HERE = ("EvaluateCheckpoints", "EvaluateTasks", "Fault", "FaultInjection", "WritePredictions")
# What a clock or a sensor says is no part of the run.
MEASURED = ("throughput/", "hardware/")


def everything():
    """In the order that the command line puts them in."""
    made = [
        WarmupCheck(steps=4, data_share=0.1),
        ContextLengthSchedule({0: 32, 6: 64}, thetas={32: 1e4, 64: 5e4}),
        NaNRollback(warmup=4, snapshot_every=4, age=2),
        Events(),
        Throughput(),
        ZLossMonitor(),
        HardwareMonitor(),
        SourceLedger(),
        EvalLoss(),
        ProgressLine(),
        CheckpointRotation(every=3),
        SampleText(every=4, tokens=8),
        RunReport(),
    ]
    names = set(callbacks.__all__).difference(NOT_HERE)
    assert {type(callback).__name__ for callback in made} == names
    return sorted(made, key=lambda callback: callback.order)


def train(folder, sources, *chosen, resume=None):
    stages = make_stages(
        sources,
        one={"start_step": 0, "cats": 0.7, "dogs": 0.3},
        two={"start_step": 8, "cats": 0.2, "dogs": 0.8},
    )
    trainer = make_trainer(
        folder,
        12,
        callbacks=list(chosen),
        logger=CSVLogger(str(folder)),
        limit_val_batches=1.0,
        val_check_interval=5,
    )
    module = make_module(dropout=0.1, z_loss=1e-4)
    trainer.fit(module, make_data(sources, stages, micro_batch_tokens=128), ckpt_path=resume)
    return module


def rows(folder):
    return [
        {k: v for k, v in row.items() if not k.startswith(MEASURED)}
        for row in CSVLogger(str(folder)).rows()
    ]


def assert_same(a, b):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder, sources, *everything())


def test_they_change_nothing(sources, whole, tmp_path):
    schedule = ContextLengthSchedule({0: 32, 6: 64}, thetas={32: 1e4, 64: 5e4})
    assert_same(train(tmp_path, sources, schedule), whole[1])


@pytest.mark.parametrize("dies_at", [1, 4, 7, 10])
def test_interrupted_equals_uninterrupted(sources, whole, tmp_path, dies_at):
    with pytest.raises(Die):
        train(tmp_path, sources, *everything(), Bomb(dies_at))
    module = train(tmp_path, sources, *everything(), resume=newest_checkpoint(tmp_path))
    assert_same(module, whole[1])
    assert rows(tmp_path) == rows(whole[0])
    for name in ("sources.json", "loss_by_position.json"):
        ours, theirs = ((f / name).read_text() for f in (tmp_path, whole[0]))
        assert json.loads(ours) == json.loads(theirs)
