"""The file of events: what is in it, after restarts and crashes too."""

import json
import logging
import math

import pytest
import yaml
from lightning import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from tiny import make_data, make_module, make_stages, make_trainer

from callbacks import Events, HardwareMonitor, Throughput, ZLossMonitor
from callbacks.events import record
from smol.optim import WSD
from smol.paths import project_root
from smol.runs import newest_checkpoint


class Reporter(Callback):
    """Has something to say at a step."""

    def __init__(self, step, error=None):
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            record(trainer, "found", "something — odd", value=math.nan, where=["a", 1])
            if self.error:
                raise self.error


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_line_tells_when_where_and_what(sources, tmp_path):
    trainer = make_trainer(tmp_path, 3, callbacks=[Reporter(2), Events()])
    trainer.fit(make_module(), make_data(sources))
    start, found, end = events(tmp_path)
    assert [start["kind"], end["kind"]] == ["start", "end"]
    assert (found["step"], found["tokens"], end["tokens"]) == (2, 2 * 256, 3 * 256)
    assert found["message"] == "something — odd"
    assert found["fields"] == {"value": "nan", "where": ["a", 1]}
    assert start["time"] <= found["time"] <= end["time"]


def test_a_restart_appends_and_survives_a_torn_line(sources, tmp_path):
    from callbacks import CheckpointRotation

    def fit(steps, *callbacks, resume=None):
        trainer = make_trainer(
            tmp_path, steps, callbacks=[Events(), *callbacks, CheckpointRotation(2)]
        )
        trainer.fit(make_module(), make_data(sources), ckpt_path=resume)

    with pytest.raises(RuntimeError, match="lost"):
        fit(6, Reporter(3, RuntimeError("lost")))
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"time": "2026')
    fit(6, resume=newest_checkpoint(tmp_path))
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert lines.pop(4) == '{"time": "2026'
    rows = [json.loads(line) for line in lines]
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("start", 0), ("saved", 2), ("found", 3), ("exception", 3),
        ("start", 2), ("saved", 4), ("end", 6), ("saved", 6),
    ]  # fmt: skip
    assert rows[3]["message"] == "RuntimeError: lost"


def test_in_any_trainer_and_without_the_callback(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        make_trainer(tmp_path, 3, callbacks=[Reporter(2)], plugins=[]).fit(BoringModel())
    assert "found at step 2: something — odd" in caplog.text
    assert not (tmp_path / "events.jsonl").exists()
    make_trainer(tmp_path, 3, callbacks=[Events(), Reporter(2)], plugins=[]).fit(BoringModel())
    assert [row["tokens"] for row in events(tmp_path)] == [None] * 3


def test_only_the_first_process_writes(tmp_path):
    class Second:
        is_global_zero = False

    Events().write(Second(), "kind", "message")
    assert not list(tmp_path.iterdir())


def test_monitors_have_nothing_to_say_of_a_healthy_run(sources, tmp_path):
    """With their defaults, over warm-up, a change of mixture and context, and decay."""
    stages = make_stages(
        sources,
        one={"start_step": 0, "cats": 0.9, "dogs": 0.1},
        two={"start_step": 150, "cats": 0.2, "dogs": 0.8, "context_length": 64},
    )
    monitors = [Events(), Throughput(peak_flops=1e15), ZLossMonitor(), HardwareMonitor(0.01)]
    module = make_module(schedule=WSD(warmup_steps=50, decay_steps=60, total_steps=300))
    make_trainer(tmp_path, 300, callbacks=monitors).fit(module, make_data(sources, stages))
    assert [row["kind"] for row in events(tmp_path)] == ["start", "end"]


def test_none_takes_every_callback_away():
    """The overlay names all that the base has, and nothing else."""
    configs = project_root() / "configs"
    files = ("base.yaml", "callbacks/none.yaml")
    base, none = (yaml.safe_load((configs / file).read_text())["callbacks"] for file in files)
    assert none == dict.fromkeys(base)
