"""A healthy run is left alone."""

import json
import os

import pytest
from tiny import make_data, make_module, make_stages, make_trainer

from callbacks import ZLossMonitor
from callbacks.events import Events
from callbacks.nan_rollback import NaNRollback
from smol.optim import WSD, OptimizerConfig

STEPS = 10_000 if "DRILLS" in os.environ else 1_000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_alarm_in_warm_up_a_change_of_stage_and_one_of_context(sources, tmp_path):
    """With the thresholds that all have unless they say otherwise."""
    stages = make_stages(
        sources,
        one={"start_step": 0, "cats": 0.9, "dogs": 0.1},
        two={"start_step": STEPS * 4 // 10, "cats": 0.1, "dogs": 0.9},
        long={"start_step": STEPS * 7 // 10, "cats": 0.5, "dogs": 0.5, "context_length": 64},
    )
    schedule = WSD(
        warmup_steps=STEPS // 50, decay_start_step=STEPS * 9 // 10, decay_steps=STEPS // 10
    )
    module = make_module(schedule, OptimizerConfig(learning_rate=0.003), z_loss=1e-4)
    guard = NaNRollback()
    trainer = make_trainer(
        tmp_path, STEPS, callbacks=[guard, ZLossMonitor(), Events()], log_every_n_steps=10
    )
    trainer.fit(module, make_data(sources, stages, micro_batch_tokens=128))
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["start", "end"]
    assert guard.attempts == trainer.global_step == STEPS
