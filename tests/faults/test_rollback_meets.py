"""What a rollback meets on its way: checkpoints, contexts, other runs, monitors, masked steps."""

import pytest
from drills import STAGES, STEP, events, train
from lightning import Callback
from tiny import make_data, make_module, make_stages, make_trainer

from callbacks import (
    CheckpointRotation,
    ContextLengthSchedule,
    Events,
    NaNRollback,
    SourceLedger,
    Throughput,
    ZLossMonitor,
)
from smol.checkpoints.store import FsspecStore, NonFiniteError
from smol.data.batch import IGNORE
from smol.errors import UserError
from smol.experiments import CSVLogger
from smol.model.rope import inverse_frequencies
from smol.runs import newest_checkpoint

NAN_WEIGHT = [{"kind": "nan_weight", "step": 15, "target": "layers.0"}]


class Thetas(Callback):
    def __init__(self):
        self.right = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        rotary = module.decoder.rotary
        expected = inverse_frequencies(rotary.head_dim, rotary.rope)
        self.right.append(
            (rotary.rope.theta == THETAS[batch.tokens.shape[1]])
            and (rotary.inv_freq == expected).all()
        )


THETAS = {32: 1e4, 64: 5e4}


@pytest.mark.parametrize(("unit", "scale"), [("steps", 1), ("tokens", STEP)])
def test_the_base_of_the_context_comes_back(unit, scale, sources, tmp_path):
    """Over a change of context, both where the context goes back with it and where it does not."""
    schedule = ContextLengthSchedule({0: 32, 14 * scale: 64}, unit, THETAS)
    thetas = Thetas()
    train(tmp_path, sources, faults=NAN_WEIGHT, callbacks=[schedule, thetas])
    assert events(tmp_path, "rollback")
    # The last batch before the rollback is judged when the buffer has been put back already.
    assert sum(not right for right in thetas.right) <= 1
    assert thetas.right[-1]


def test_a_checkpoint_of_poisoned_weights_leaves_the_guard_its_turn(sources, tmp_path):
    # The step after 14 spoils the weights, and at 15 a checkpoint is due.
    faults = [{"kind": "nan_moment", "step": 14, "target": "mlp"}]
    run = train(tmp_path, sources, faults=faults, callbacks=[CheckpointRotation(every=5)])
    assert run.global_step == 24
    assert events(tmp_path, "save_failed")
    assert events(tmp_path, "rollback")


def test_without_a_guard_the_second_poisoned_checkpoint_ends_the_run(sources, tmp_path):
    faults = [{"kind": "nan_moment", "step": 14, "target": "mlp"}]
    with pytest.raises(NonFiniteError, match="the checkpoint of step 18 is refused"):
        train(
            tmp_path, sources, faults=faults, guard=False, callbacks=[CheckpointRotation(every=2)]
        )


def test_another_mixture_in_the_same_stage_is_no_divergence(sources, tmp_path):
    def run(weights, steps, resume=None):
        stages = make_stages(sources, one={"start_step": 0, **weights})
        guard = NaNRollback(window=16, warmup=8, snapshot_every=10, age=5)
        guard.detector.loss.absolute = 1e-6  # any other loss would be a spike
        guard.detector.loss.relative = 0.0
        callbacks = [guard, Events(), CheckpointRotation(every=10)]
        trainer = make_trainer(tmp_path, steps, callbacks=callbacks)
        trainer.fit(make_module(), make_data(sources, stages), ckpt_path=resume)
        return guard

    first = run({"cats": 0.9, "dogs": 0.1}, 20)
    assert len(first.detector.loss.values) > 8
    second = run({"cats": 0.1, "dogs": 0.9}, 24, newest_checkpoint(tmp_path))
    assert len(second.detector.loss.values) <= 4


def test_a_run_that_was_left_is_not_returned_to(sources, tmp_path):
    train(tmp_path, sources, 12, callbacks=[CheckpointRotation(every=3, keep=9)])
    before = {info.key for info in FsspecStore(tmp_path / "checkpoints").list()}

    class OnAnotherLineage(Callback):
        def setup(self, trainer, module, stage):
            module.lineage = 1

    faults = [{"kind": "nan_loss", "step": 14, "times": 4}]
    train(
        tmp_path,
        sources,
        faults=faults,
        guard={"snapshots": 2, "age": 5},
        callbacks=[OnAnotherLineage(), CheckpointRotation(every=100, keep=9)],
    )
    memory, disk = (e["fields"]["returned_to"] for e in events(tmp_path, "rollback"))
    assert memory == "snapshot of step 5"
    assert disk not in before  # its own, of the first rollback


def test_monitors_do_not_take_a_rollback_for_a_step(sources, tmp_path):
    logger = CSVLogger(str(tmp_path))
    monitors = [SourceLedger(), ZLossMonitor(), Throughput()]
    train(tmp_path, sources, faults=NAN_WEIGHT, monitors=monitors, logger=logger)
    rows = logger.rows()
    assert [int(row["step"]) for row in rows] == list(range(1, 25))
    for row in rows:
        assert row["train/loss"]
        assert float(row["z_loss/mean_square"]) > 0


def test_a_drop_does_not_log_the_step_before_it_again(sources, tmp_path):
    class Rows(CSVLogger):
        def log_metrics(self, metrics, step=None):
            if "train/loss" in metrics:
                logged.append(int(step))
            super().log_metrics(metrics, step)

    logged = []
    faults = [{"kind": "nan_loss", "step": 15}]
    train(tmp_path, sources, faults=faults, logger=Rows(str(tmp_path)))
    assert logged == list(range(1, 25))


def test_a_restart_does_not_take_the_way_that_was_left(sources, tmp_path):
    class Die(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if module.lineage and trainer.global_step == 11:
                raise RuntimeError("dies")

    with pytest.raises(RuntimeError, match="dies"):
        train(tmp_path, sources, faults=NAN_WEIGHT, callbacks=[Die(), CheckpointRotation(every=3)])
    newest = FsspecStore(tmp_path / "checkpoints").list()[-1].manifest
    assert (newest.lineage, newest.step) == (1, 10)


def test_steps_with_nothing_to_learn_are_not_compared_with(sources, tmp_path):
    class Mask(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if 12 * STEP <= batch.position < 17 * STEP:
                batch.exact = False
                batch.targets.fill_(IGNORE)

    run = train(tmp_path, sources, callbacks=[Mask()], stages={"one": STAGES["one"]})
    assert not events(tmp_path, "dropped_step", "rollback")
    assert run.datamodule.loader.position == (24 + 5) * STEP


@pytest.mark.parametrize(
    "wrong", [{"window": 32}, {"snapshot_every": 0, "age": 0}, {"warmup": 0}, {"recurs": 0}]
)
def test_settings_that_would_switch_a_guard_off_are_one_line(wrong):
    with pytest.raises(UserError, match="NaNRollback .* expected"):
        NaNRollback(**wrong)
