"""The logits' scale, against whole logits, and faults that make them drift."""

import json

import pytest
import torch
from lightning import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from tiny import make_data, make_module, make_trainer

from callbacks import CheckpointRotation, Events, ZLossMonitor
from smol.data.batch import IGNORE
from smol.experiments import CSVLogger
from smol.runs import newest_checkpoint


class Logits(Callback):
    """Computes every logit of every micro-batch before it is trained on, in float64."""

    def __init__(self):
        self.by_step = {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        batch.exact = False
        batch.targets[:, 3:5] = IGNORE
        with torch.no_grad():
            logits = module.decoder(batch.tokens, batch.positions, batch.documents).double()
        kept = batch.targets != IGNORE
        logits, targets = logits[kept], batch.targets[kept]
        lse = logits.exp().sum(dim=-1).log()
        target = logits[torch.arange(len(targets)), targets]
        self.by_step.setdefault(trainer.global_step + 1, []).append((lse, target))


def test_figures_are_those_of_whole_logits(sources, tmp_path):
    reference, z_loss = Logits(), 0.01
    trainer = make_trainer(
        tmp_path, 8, callbacks=[reference, ZLossMonitor()],
        logger=CSVLogger(str(tmp_path)), log_every_n_steps=2,
    )  # fmt: skip
    trainer.fit(make_module(z_loss=z_loss), make_data(sources, micro_batch_tokens=64))
    rows = CSVLogger(str(tmp_path)).rows()
    assert [row["step"] for row in rows] == ["2", "4", "6", "8"]
    for row in rows:
        assert len(reference.by_step[int(row["step"])]) == 4
        lse, target = map(torch.cat, zip(*reference.by_step[int(row["step"])], strict=True))
        squares = lse.square().mean()
        expected = {
            "mean_square": squares,
            "log_partition_mean": lse.mean(),
            "log_partition_max": lse.max(),
            "target_logit_rms": target.square().mean().sqrt(),
            "share": z_loss * squares / ((lse - target).mean() + z_loss * squares),
        }
        for name, value in expected.items():
            assert float(row[f"z_loss/{name}"]) == pytest.approx(float(value), rel=1e-5), name


class Grow(Callback):
    """Multiplies the gain of the last norm, which scales all logits, at each of some steps."""

    def __init__(self, steps, factor):
        self.steps, self.factor = steps, factor

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step in self.steps:
            with torch.no_grad():
                module.decoder.model.norm.weight.mul_(self.factor)


def drifts(folder):
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "z_loss_drift"]


def test_a_jump_of_the_log_partition_is_an_event(sources, tmp_path):
    callbacks = [Events(), Grow([40], 20.0), ZLossMonitor(limit=1e9)]
    make_trainer(tmp_path, 50, callbacks=callbacks).fit(make_module(), make_data(sources))
    (event,) = drifts(tmp_path)  # one, however long it lasts
    assert event["step"] == 43  # the third step that was far
    assert event["fields"]["log_partition_mean"] > 3 * event["fields"]["usual"]


def test_a_creeping_growth_of_the_logits_is_an_event(sources, tmp_path):
    """Too slow to be far from the median, and yet ever larger."""
    callbacks = [Events(), Grow(range(20, 80), 1.08), ZLossMonitor(threshold=1e9)]
    make_trainer(tmp_path, 80, callbacks=callbacks).fit(make_module(), make_data(sources))
    (event,) = drifts(tmp_path)
    assert event["fields"]["target_logit_rms"] > 64


def test_what_was_far_does_not_become_usual():
    class Quiet:
        global_step, callbacks = 0, ()

    monitor = ZLossMonitor(window=20)
    for value in [5.0] * 20 + [50.0] * 30 + [float("nan")] * 5:
        monitor._watch(Quiet(), value, 5.0)
    assert monitor.state_dict() == {"accepted": [5.0] * 20, "far": 35}
    monitor._watch(Quiet(), 5.1, 5.0)
    assert monitor.state_dict()["far"] == 0


def test_state_survives_a_restart(sources, tmp_path):
    def fit(folder, steps, resume=None):
        monitor = ZLossMonitor(window=5)
        callbacks = [monitor, CheckpointRotation(every=3)]
        trainer = make_trainer(folder, steps, callbacks=callbacks, log_every_n_steps=2)
        trainer.fit(make_module(), make_data(sources), ckpt_path=resume)
        return monitor.state_dict()

    whole = fit(tmp_path / "whole", 14)
    fit(tmp_path / "broken", 7)
    resume = newest_checkpoint(tmp_path / "broken")
    assert fit(tmp_path / "broken", 14, resume) == whole
    assert json.loads(json.dumps(whole)) == whole
    assert len(whole["accepted"]) == 5


def test_another_module_is_left_alone(tmp_path):
    trainer = make_trainer(tmp_path, 3, plugins=[], callbacks=[ZLossMonitor()])
    trainer.fit(BoringModel())
    assert not trainer.callback_metrics


def test_nothing_is_left_behind(sources, tmp_path):
    module = make_module()
    make_trainer(tmp_path, 2, callbacks=[ZLossMonitor()]).fit(module, make_data(sources))
    assert not module.decoder._forward_hooks
