"""Causes faults that the guard knows nothing of, and compares with runs that never met them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from drills import GUARD, STAGES, STEP, equal, events, steps, train, weights
from lightning import Callback, LightningModule
from lightning.pytorch import Trainer

from callbacks import CheckpointRotation
from callbacks.fault_injection import FaultInjection
from callbacks.nan_rollback import NaNRollback
from callbacks.parts.faults import Fault
from callbacks.parts.spike_detector import SpikeDetector
from smol.checkpoints.store import FsspecStore
from smol.data.stages import Segment
from smol.errors import UserError
from smol.experiments import CSVLogger
from smol.runs import newest_checkpoint

# Faults of one step: it is dropped, and all goes on as if its data had never been there.
DROPPED = {
    "nan loss": {"kind": "nan_loss", "micro": 0},
    "infinite loss": {"kind": "inf_loss"},
    "nan in an activation of one micro-batch": {
        "kind": "nan_activation",
        "micro": 0,
        "target": "layers.0.mlp",
    },
    "nan in one element of one gradient": {"kind": "nan_gradient", "target": "layers.1.*q_proj"},
    "infinity in one element of one gradient": {"kind": "inf_gradient", "target": "norm"},
    "nan in one micro-batch's gradient": {
        "kind": "nan_gradient_before_reduce",
        "micro": 0,
        "target": "layers.1.mlp",
    },
    "loss spike": {"kind": "loss_spike"},
    "gradient explosion": {"kind": "gradient_explosion"},
    "corrupt batch": {"kind": "corrupt_batch"},
}

# Faults that stay: what they have done is undone. With the steps whose data is then left out.
UNDONE = {
    "nan in a weight": ([{"kind": "nan_weight", "step": 15, "target": "layers.0"}], steps(10, 16)),
    "infinity in a weight": (
        [{"kind": "nan_weight", "step": 15, "value": float("inf"), "target": "embed"}],
        steps(10, 16),
    ),
    # The step that it strikes is taken, and spoils the weights for the next two.
    "nan in a moment": ([{"kind": "nan_moment", "step": 14, "target": "mlp"}], steps(10, 16)),
    # Three steps are taken with it before the loss is far enough from what it was.
    "a weight that grows by half at each step": (
        [{"kind": "scaled_weight", "step": 15, "times": 5, "value": 1.5, "target": "embed"}],
        steps(10, 19),
    ),
    "two bad batches in a row": ([{"kind": "nan_loss", "step": 15, "times": 2}], steps(10, 16)),
}


@pytest.fixture(scope="module")
def controls(sources, tmp_path_factory):
    """Unguarded runs on data without certain steps, made when asked for."""
    made = {}

    def control(omit):
        key = tuple(omit)
        if key not in made:
            made[key] = train(tmp_path_factory.mktemp("control"), sources, omit=key)
        return made[key]

    return control


@pytest.mark.parametrize("name", DROPPED)
def test_a_bad_step_is_as_if_its_data_had_never_been_there(name, sources, tmp_path, controls):
    run = train(tmp_path, sources, faults=[{"step": 15, **DROPPED[name]}])
    assert [e["kind"] for e in events(tmp_path)] == ["dropped_step"]
    control = controls(steps(15, 15))
    assert equal(run, control)
    assert run.watch.losses == control.watch.losses | {(15, 1): run.watch.losses[15, 1]}


@pytest.mark.parametrize("name", UNDONE)
def test_what_comes_back_is_undone_and_other_data_read(name, sources, tmp_path, controls):
    faults, omit = UNDONE[name]
    run = train(tmp_path, sources, faults=faults)
    kinds = [e["kind"] for e in events(tmp_path)]
    assert kinds == ["dropped_step", "rollback"]
    (skipped,) = run.datamodule.loader.curriculum.segments[0].skipped
    assert list(omit) == list(range(*skipped, STEP))
    assert equal(run, controls(omit))


def test_dropout_goes_on_with_the_random_numbers_of_a_run_without_the_fault(sources, tmp_path):
    decoder = {"decoder": {"dropout": 0.2}}
    for faults, omit in (
        ([{"kind": "nan_loss", "step": 15}], steps(15, 15)),
        UNDONE["nan in a weight"],
    ):
        run = train(tmp_path / str(len(omit)), sources, faults=faults, **decoder)
        assert equal(run, train(tmp_path / "control", sources, omit=omit, **decoder))


@pytest.mark.slow
def test_workers_that_read_ahead_do_not_matter(sources, tmp_path, controls):
    faults, omit = UNDONE["nan in a weight"]
    assert equal(train(tmp_path, sources, faults=faults, num_workers=2), controls(omit))


@pytest.mark.parametrize("micro", [STEP, STEP // 4])
def test_any_accumulation(micro, sources, tmp_path):
    faults, omit = UNDONE["nan in a weight"]
    run = train(tmp_path, sources, faults=faults, micro=micro)
    assert equal(run, train(tmp_path / "control", sources, omit=omit, micro=micro))


def test_stages_begin_at_their_step_and_a_restart_knows_what_was_skipped(sources, tmp_path):
    faults = UNDONE["nan in a weight"][0] + [{"kind": "nan_loss", "step": 5}]
    kwargs = {"faults": faults, "stages": STAGES}
    whole = train(tmp_path / "whole", sources, **kwargs)
    # Step 18 is the 26th that is read: one was dropped, five undone, two bad when they were read.
    first = min(p for p, stage in whole.watch.stages.items() if stage == "two")
    assert first == (18 + 1 + 7) * STEP
    checkpoint = CheckpointRotation(every=4)
    train(tmp_path / "parts", sources, 16, callbacks=[checkpoint], **kwargs)
    resume = newest_checkpoint(tmp_path / "parts")
    parts = train(tmp_path / "parts", sources, resume=resume, **kwargs)
    assert equal(whole, parts)
    saved, expected = (
        json.loads(json.dumps(run.datamodule.state_dict()["segments"])) for run in (parts, whole)
    )
    assert saved == expected
    assert Segment.from_json(saved[0]).skipped == ((5 * STEP, 6 * STEP), (11 * STEP, 18 * STEP))


def test_checkpoints_after_a_rollback_are_the_newer_ones(sources, tmp_path):
    # The checkpoint of step 15 is made on the way that is left, and again on the other.
    faults = UNDONE["nan in a weight"][0]
    train(tmp_path, sources, 17, faults=faults, callbacks=[CheckpointRotation(every=1, keep=30)])
    infos = FsspecStore(tmp_path / "checkpoints").list()
    places = [(info.manifest.lineage, info.manifest.step) for info in infos]
    assert places == [(0, s) for s in range(1, 16)] + [(1, s) for s in range(10, 18)]
    assert newest_checkpoint(tmp_path).name == infos[-1].key


def test_the_log_is_that_of_the_way_that_was_taken(sources, tmp_path):
    logger = CSVLogger(str(tmp_path))
    train(tmp_path, sources, faults=UNDONE["nan in a weight"][0], logger=logger)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [int(row.split(",")[0]) for row in rows[1:]] == list(range(1, 25))


def test_a_snapshot_with_numbers_that_are_not_finite_is_none(sources, tmp_path):
    class Spoil(Callback):
        """A weight that no loss depends on: the embedding of a token that never comes."""

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch.position == 9 * STEP:
                module.decoder.model.embed_tokens.weight.data[-1] = float("nan")

    run = train(
        tmp_path,
        sources,
        faults=[{"kind": "nan_loss", "step": 15, "times": 2}],
        callbacks=[Spoil()],
        decoder={"tie_embeddings": False},
    )
    assert events(tmp_path, "snapshot_not_finite")
    assert events(tmp_path, "rollback")[0]["step"] == 5
    assert all(weight.isfinite().all() for weight in weights(run) if weight.is_floating_point())


def test_a_snapshot_that_did_not_help_is_not_tried_again_then_comes_a_checkpoint(
    sources, tmp_path, controls
):
    run = train(
        tmp_path,
        sources,
        faults=[{"kind": "nan_loss", "step": 14, "times": 4}],
        guard={"snapshots": 2, "age": 5, "learning_rate_cut": 1.0},
        callbacks=[CheckpointRotation(every=3, keep=9)],
    )
    memory, disk = (e["fields"]["returned_to"] for e in events(tmp_path, "rollback"))
    assert memory == "snapshot of step 5"
    infos = {i.key: i.manifest for i in FsspecStore(tmp_path / "checkpoints").list()}
    assert (infos[disk].lineage, infos[disk].step) == (1, 9)
    skipped = run.datamodule.loader.curriculum.segments[0].skipped
    assert equal(run, controls([p for start, stop in skipped for p in range(start, stop, STEP)]))


class LoseDisk(Callback):
    """Deletes the local checkpoints before the second rollback, when all have been uploaded."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 14 and module.lineage == 1:
            (rotation,) = (c for c in trainer.callbacks if isinstance(c, CheckpointRotation))
            rotation._rotation.mirror.flush(self.seconds)
            shutil.rmtree(Path(trainer.default_root_dir, "checkpoints"), ignore_errors=True)


def test_a_checkpoint_that_is_only_in_the_store_will_do(sources, tmp_path, controls):
    run = train(
        tmp_path / "run",
        sources,
        faults=[{"kind": "nan_loss", "step": 14, "times": 4}],
        guard={"snapshots": 2, "age": 5, "learning_rate_cut": 1.0},
        callbacks=[CheckpointRotation(every=3, keep=9, store=str(tmp_path / "safe")), LoseDisk(20)],
    )
    memory, store = (e["fields"]["returned_to"] for e in events(tmp_path / "run", "rollback"))
    assert memory == "snapshot of step 5"
    infos = {i.key: i.manifest for i in FsspecStore(tmp_path / "safe/run").list()}
    assert (infos[store].lineage, infos[store].step) == (1, 9)
    skipped = run.datamodule.loader.curriculum.segments[0].skipped
    assert equal(run, controls([p for start, stop in skipped for p in range(start, stop, STEP)]))


def test_a_store_that_cannot_be_read_is_no_state_to_return_to(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("smol.checkpoints.replicas.ATTEMPTS", 1)
    (tmp_path / "safe").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="no state is left to go back to"):
        train(
            tmp_path / "run",
            sources,
            faults=[{"kind": "nan_loss", "step": 14, "times": 9}],
            guard={"snapshots": 2, "age": 5},
            callbacks=[
                CheckpointRotation(every=0, store=str(tmp_path / "safe"), patience=0),
                LoseDisk(0),
            ],
        )


def test_the_higher_loss_of_an_earlier_state_is_no_spike(sources, tmp_path):
    faults = [{"kind": "nan_loss", "step": 20, "times": 2}]
    train(tmp_path, sources, 26, faults=faults, guard={"snapshots": 4, "age": 14})
    assert [e["kind"] for e in events(tmp_path)] == ["dropped_step", "rollback"]
    assert events(tmp_path, "rollback")[0]["step"] == 5


def test_a_fault_that_stays_ends_the_run_and_leaves_what_is_known(sources, tmp_path):
    faults = [{"kind": "nan_activation", "step": 15, "times": 99, "target": "layers.1.mlp"}]
    with pytest.raises(UserError, match="training diverged at step .*; 3 rollbacks") as error:
        train(tmp_path, sources, faults=faults)
    (folder,) = (tmp_path / "nan_rollback").iterdir()
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    report = json.loads((folder / "rank-0" / "report.json").read_text())
    assert report["verdict"]["losses"] == [{"rank": 0, "which": [1]}]
    assert [batch["micro"] for batch in report["batches"]] == [0, 1]
    assert "decoder.model.layers.1.mlp.up_proj.weight" in report["norms"]
    from safetensors.torch import load_file

    assert load_file(folder / "rank-0" / "batch-1.safetensors")["tokens"].shape == (4, 32)
    scales = [e["fields"]["learning_rate_scale"] for e in events(tmp_path, "rollback")]
    assert scales == [1.0, 0.5, 0.25]
    assert events(tmp_path, "diverged")


def test_the_first_module_whose_output_is_not_finite_is_named(sources, tmp_path):
    faults = [{"kind": "nan_weight", "step": 15, "target": "layers.1.mlp.up_proj"}]
    train(tmp_path, sources, faults=faults)
    (event,) = events(tmp_path, "rollback")
    assert event["fields"]["first_non_finite_module"].endswith("layers.1.mlp.up_proj")
    assert event["fields"]["weights"] == [
        {"rank": 0, "which": ["decoder.model.layers.1.mlp.up_proj.weight"]}
    ]


def test_a_value_that_was_rejected_is_not_compared_with():
    detector = SpikeDetector(10.0, window=32, warmup=8)
    for i in range(20):
        assert detector.judge(2.0 + 0.01 * (i % 3), 1.0) is None
    for _ in range(100):  # however often: a spike stays one
        assert detector.judge(9.0, 1.0)
        assert detector.judge(float("nan"), 1.0)
        assert detector.judge(2.0, float("inf"))
        assert detector.judge(2.0, 1e9)
    assert detector.judge(2.0, 1.0) is None


def test_a_restart_knows_what_was_usual(sources, tmp_path):
    train(tmp_path, sources, 12, callbacks=[CheckpointRotation(every=4)])
    faults = [{"kind": "loss_spike", "step": 13}]
    train(tmp_path, sources, 16, faults=faults, resume=newest_checkpoint(tmp_path))
    assert events(tmp_path, "dropped_step")


class Plain(LightningModule):
    """Somebody else's module: its own optimiser, schedule, dropout and batches of tensors."""

    def __init__(self):
        super().__init__()
        dropout = torch.nn.Dropout(0.1)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), dropout, torch.nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def train_plain(folder, batches, faults=(), guard=True):
    torch.manual_seed(1)
    module = Plain()
    callbacks = [FaultInjection([Fault(**f) for f in faults])]
    callbacks += [NaNRollback(**GUARD)] if guard else []
    trainer = Trainer(
        accelerator="cpu",
        max_steps=20,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    torch.manual_seed(2)
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert trainer.global_step == 20
    return module


@pytest.mark.parametrize("omit", ["dropped", "undone"])
def test_in_any_trainer_with_any_module(omit, tmp_path):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 16, 8, generator=generator)
    batches = [(row, row.sum(1, keepdim=True)) for row in x]
    if omit == "dropped":
        faults, left_out = [{"kind": "nan_gradient", "step": 12}], {12}
    else:
        faults, left_out = [{"kind": "nan_weight", "step": 12}], set(range(5, 14))
    module = train_plain(tmp_path, batches, faults)
    clean = [batch for i, batch in enumerate(batches) if i not in left_out]
    control = train_plain(tmp_path / "control", clean, guard=False)
    for a, b in zip(module.parameters(), control.parameters(), strict=True):
        assert torch.equal(a, b)


def test_settings_that_would_leave_no_snapshot_are_one_line():
    with pytest.raises(UserError, match="an age up to snapshot_every x"):
        NaNRollback(snapshots=2, snapshot_every=10, age=11)
