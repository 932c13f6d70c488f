"""Loggers: one row per step, nothing doubled after a restart."""

import csv

import pytest

from smol.experiments import CSVLogger, TensorBoardLogger, WandbLogger
from smol.experiments.plots import read_metrics


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_of_a_step_share_a_row_and_new_ones_add_a_column(tmp_path):
    logger = CSVLogger(str(tmp_path))
    logger.log_metrics({"loss": 3.0}, 1)
    logger.log_metrics({"loss": 2.0}, 2)
    logger.log_metrics({"held_out": 9.0}, 2)
    logger.log_metrics({"loss": 1.0, "epoch": 0}, 3)
    assert read(logger.path) == [
        {"step": "1", "loss": "3.0", "held_out": ""},
        {"step": "2", "loss": "2.0", "held_out": "9.0"},
        {"step": "3", "loss": "1.0", "held_out": ""},
    ]
    assert read_metrics(logger.path)["held_out"] == ([2], [9.0])


def test_rewinding_forgets_what_came_later(tmp_path):
    logger = CSVLogger(str(tmp_path))
    for step in range(1, 6):
        logger.log_metrics({"loss": float(step)}, step)
    again = CSVLogger(str(tmp_path))
    again.rewind(3)
    again.log_metrics({"loss": 40.0}, 4)
    assert [(r["step"], r["loss"]) for r in read(again.path)] == [
        ("1", "1.0"),
        ("2", "2.0"),
        ("3", "3.0"),
        ("4", "40.0"),
    ]


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    logger = CSVLogger(str(tmp_path))
    logger.log_metrics({"loss": 1.0, "norm": 2.0}, 1)
    logger.log_metrics({"loss": 1.5, "norm": 2.5}, 2)
    with open(logger.path, "rb+") as file:
        file.truncate(logger.path.stat().st_size - 5)
    again = CSVLogger(str(tmp_path))
    again.rewind(1)
    again.log_metrics({"loss": 7.0, "norm": 8.0}, 2)
    assert [r["loss"] for r in read(again.path)] == ["1.0", "7.0"]


def test_tensorboard_hides_what_came_later(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resumed_at in (None, 2):
        logger = TensorBoardLogger(str(tmp_path))
        if resumed_at is not None:
            logger.rewind(resumed_at)
        for step in range((resumed_at or 0) + 1, 5):
            logger.log_metrics({"loss": 10.0 * (resumed_at or 0) + step}, step)
        logger.finalize("success")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 23.0),
        (4, 24.0),
    ]


@pytest.mark.slow
def test_wandb_goes_on_as_the_same_run_and_sends_no_step_twice(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    sent = []
    first = WandbLogger(str(tmp_path), offline=True, project="test")
    for step in range(1, 5):
        first.log_metrics({"loss": float(step)}, step)
    run_id = first.experiment.id
    wandb.finish()
    second = WandbLogger(str(tmp_path), offline=True, project="test")
    monkeypatch.setattr(second.experiment, "log", lambda m, **kwargs: sent.append(m))
    for step in range(3, 7):  # the restart repeats steps 3 and 4
        second.log_metrics({"loss": float(step)}, step)
        second.log_metrics({"held_out": float(step)}, step)
    assert second.experiment.id == run_id
    assert [m["loss"] for m in sent if "loss" in m] == [5, 6]
    assert [m["held_out"] for m in sent if "held_out" in m] == [5, 6]
    wandb.finish()
