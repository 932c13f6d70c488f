"""What the check finds, and that a run does not know whether there was one."""

import json
import math
import re

import pytest
import torch
from lightning.pytorch.profilers import SimpleProfiler
from tiny import make_data, make_module, make_trainer
from torch.utils.data import DataLoader, IterableDataset
from warmup_parts import (
    TRIAL,
    Foreign,
    assert_same,
    damaged,
    files,
    fit,
    report,
    strange_token,
    taken,  # noqa: F401
    timed,
    tiny_data,
)

from callbacks import CheckpointRotation, Events, Throughput, ZLossMonitor
from callbacks.nan_rollback import NaNRollback
from callbacks.parts.trial_steps import TrialSteps
from callbacks.warmup_check import WarmupCheck
from smol.data.batch import IGNORE
from smol.errors import UserError
from smol.experiments import CSVLogger
from smol.optim import OptimizerConfig
from smol.runs import newest_checkpoint

# -- with and without ------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_is_the_same_with_and_without(sources, tmp_path, taken, workers):
    """Over a change of context and accumulation, and with dropout."""
    left = {}
    for name, check in {"with": WarmupCheck(**TRIAL), "without": None}.items():
        data = tiny_data(sources, num_workers=workers)
        left[name] = fit(sources, tmp_path / name / "run", check, data=data)
    assert_same(left["with"], left["without"])
    found = files(tmp_path / "with/run")
    assert len([name for name in found if name.endswith("model.safetensors")]) == 6
    assert found == files(tmp_path / "without/run")
    positions = [{b.position for b in step} for step in taken]
    assert positions == [{192 * (i % 4)} for i in range(10)]
    assert [len(step) for step in taken] == [(6, 6, 6, 3)[i % 4] for i in range(10)]
    assert taken.counts == list(range(1, 11))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_module_of_anothers_is_the_same_too(tmp_path, taken, workers):
    """Normalisation, a schedule of torch's, metrics and lists, logging, shuffling, two epochs."""
    left = {}
    for name, check in {"with": WarmupCheck(TRIAL["steps"], 0.5), "without": None}.items():
        module = Foreign(workers)
        options = {"steps": 12, "module": module, "accumulate_grad_batches": 3}
        left[name] = *fit(None, tmp_path / name / "run", check, **options), module.losses
    assert_same(left["with"], left["without"])
    assert left["with"][3] == left["without"][3]
    assert len(left["with"][3]) == 25
    assert files(tmp_path / "with/run") == files(tmp_path / "without/run")
    assert [len(step) for step in taken] == [3] * 10
    assert taken.counts == list(range(1, 11))
    assert taken.rates == [0.5 * 0.5 ** (i // 2) for i in range(10)]
    inputs = [torch.cat([batch[0] for batch in step]) for step in taken]
    assert torch.equal(inputs[0], inputs[2])  # half of 64 samples are two steps of twelve
    assert not torch.equal(inputs[0], inputs[1])


def test_other_callbacks_do_not_hear_of_it(sources, tmp_path):
    """Wherever it stands among them; what they log, count and keep is the same."""
    left = {}
    for name in ("without", "first", "last"):
        profiler = SimpleProfiler()
        monitors = [NaNRollback(window=8, warmup=2), Throughput(), ZLossMonitor(least=2)]
        check = [] if name == "without" else [WarmupCheck(**TRIAL)]
        callbacks = [*check, *monitors] if name == "first" else [*monitors, *check]
        folder = tmp_path / name / "run"
        data = tiny_data(sources, micro_batch_tokens=64)
        left[name] = fit(
            sources, folder, callbacks=callbacks, data=data, steps=4, profiler=profiler
        )
        rows = CSVLogger(str(folder)).rows()
        rows = [{k: v for k, v in row.items() if not timed(k)} for row in rows]
        states = {k: v for k, v in files(folder).items() if k.endswith("state.json")}
        calls = {k: len(v) for k, v in profiler.recorded_durations.items() if "Warmup" not in k}
        left[name] = *left[name], rows, states, calls
    for name in ("first", "last"):
        assert_same(left[name], left["without"])
        assert left[name][3:] == left["without"][3:]
    assert "z_loss/mean_square" in left["first"][3][0]


def test_nothing_is_saved_or_logged_during_it(sources, tmp_path, monkeypatch):
    seen, take = [], TrialSteps.take

    def look(self, micro_batches):
        result = take(self, micro_batches)
        seen.append([path.name for path in tmp_path.rglob("*") if path.is_file()])
        return result

    monkeypatch.setattr(TrialSteps, "take", look)
    fit(sources, tmp_path, WarmupCheck(**TRIAL), steps=2, data=tiny_data(sources))
    assert seen == [[]] * 10
    assert (tmp_path / "metrics.csv").exists()
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 2


def nothing_to_learn(batch, count):
    """In the second optimiser step and the fourth."""
    if batch.position in (192, 576):
        batch.targets.fill_(IGNORE)
        batch.exact = False


def test_steps_that_are_dropped_in_it_are_dropped_again(sources, tmp_path, taken):
    left = {}
    for name, check in {"with": WarmupCheck(**TRIAL, fall=None), "without": None}.items():
        with damaged(nothing_to_learn):
            left[name] = fit(sources, tmp_path / name / "run", check, data=tiny_data(sources))
    assert_same(left["with"], left["without"])
    assert files(tmp_path / "with/run") == files(tmp_path / "without/run")
    assert taken.counts == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert len(report(tmp_path / "with/run")["loss"]["values"]["losses"]) == 5


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_its_steps_are_those_of_the_run(sources, tmp_path, precision):
    """On as much data as the run's they have the same losses, learning rates and dropout."""
    check = WarmupCheck(6, data_share=1.0)
    fit(sources, tmp_path, check, data=tiny_data(sources), precision=precision)
    logged = [float(row["train/loss"]) for row in CSVLogger(str(tmp_path)).rows()]
    assert report(tmp_path)["loss"]["values"]["losses"] == pytest.approx(logged, rel=1e-6)


# -- what it finds ---------------------------------------------------------------------------------


def check_run(sources, folder, module=None, check=None, **kwargs):
    """Check a run of a few steps; it trains only if that passes."""
    callbacks = [check or WarmupCheck(10), Events(), CheckpointRotation(every=1)]
    make_trainer(folder, 3, callbacks=callbacks, logger=CSVLogger(str(folder)), **kwargs).fit(
        module or make_module(), make_data(sources)
    )


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def usual(folder):
    """Kinds of events, but for checkpoints and what a busy machine causes."""
    apart = ("slow_step", "slow_process", "saved")
    return [e["kind"] for e in events(folder) if e["kind"] not in apart]


def assert_stops(sources, folder, message, **kwargs):
    with pytest.raises(UserError, match=message) as error:
        check_run(sources, folder, **kwargs)
    assert "go without it with --callbacks.warmup_check null" in str(error.value)
    assert "\n" not in str(error.value)
    assert str(folder / "warmup_check.json") in str(error.value)
    assert not report(folder)["passed"]
    assert usual(folder) == ["warmup_check", "exception"]
    assert {path.name for path in folder.iterdir()} == {"events.jsonl", "warmup_check.json"}


def test_a_sound_run_goes_on(sources, tmp_path, capsys):
    check_run(sources, tmp_path)
    found = report(tmp_path)
    assert found["passed"]
    assert found["data"]["values"] == {
        "steps": 10, "different": 1, "shared_rows": 0.0, "faults": []
    }  # fmt: skip
    assert found["throughput"]["values"]["unit"] == "tokens/s"
    assert usual(tmp_path) == ["warmup_check", "start", "end"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        "collectives", "data", "loss", "throughput", "memory"
    ]  # fmt: skip


def still():
    """A module that does not learn."""
    return make_module(optimizer=OptimizerConfig(learning_rate=0.0))


def wrong_targets(batch, count):
    batch.targets = batch.tokens.clone()


def wrong_positions(batch, count):
    batch.positions[:] = torch.arange(batch.positions.shape[1])


def other_each_time(batch, count):
    batch.tokens[0, 0] = count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (strange_token, r"data: token 5000 is not in the vocabulary of 384 \(step 0\)"),
        (wrong_targets, "data: a target is not the token that follows"),
        (wrong_positions, "data: positions do not count from the beginning of each document"),
        (other_each_time, "data: read twice, a batch was not the same"),
    ],
)
def test_damaged_data_stop_before_they_are_trained_on(sources, tmp_path, taken, change, message):
    with damaged(change):
        assert_stops(sources, tmp_path, message + r".*expected sound batches")
    assert not taken


def test_a_loss_that_does_not_fall(sources, tmp_path):
    message = r"loss: (5\.\d+) at first and \1 at last, expected finite, and a fall by 0.02 nats"
    assert_stops(sources, tmp_path, message, module=still())


def test_a_loss_that_is_no_number(sources, tmp_path, taken):
    module = make_module()
    step, steps = module.training_step, iter(range(100))
    module.training_step = lambda *a: step(*a) * (math.nan if next(steps) == 6 else 1)
    assert_stops(sources, tmp_path, "loss: nan at step 7, expected finite", module=module)
    assert len(taken) == 7


def test_speed_out_of_its_band(sources, tmp_path):
    check = WarmupCheck(10, band=(1e9, 1e10))
    message = r"throughput: .* tokens/s, .* expected 1e\+09 to 1e\+10 tokens/s"
    assert_stops(sources, tmp_path, message, check=check)


def test_too_little_memory(sources, tmp_path):
    check = WarmupCheck(10, memory_headroom=1.0)
    message = r"memory: \d+\.\d% free at the least, expected 100.0% or more"
    assert_stops(sources, tmp_path, message, check=check)


def test_everything_that_fails_is_told(sources, tmp_path):
    check = WarmupCheck(10, memory_headroom=1.0, band=(1e9, 1e10))
    message = "loss: .* expected .*; throughput: .* expected .*; memory: .* expected"
    assert_stops(sources, tmp_path, message, check=check, module=still())


# -- when, and on what -----------------------------------------------------------------------------


def test_only_the_beginning_of_a_run_is_checked(sources, tmp_path, taken):
    def run(steps, resume=None, **kwargs):
        callbacks = [WarmupCheck(10), CheckpointRotation(every=2)]
        trainer = make_trainer(tmp_path, steps, callbacks=callbacks, **kwargs)
        trainer.fit(make_module(), make_data(sources), ckpt_path=resume)

    run(2)
    assert len(taken) == 10
    run(4, newest_checkpoint(tmp_path))
    run(2, fast_dev_run=2)
    assert len(taken) == 10


def test_the_share_is_of_the_runs_data(sources, tmp_path, taken):
    make_trainer(tmp_path, 1000, callbacks=[WarmupCheck(25), Stop()]).fit(
        make_module(), make_data(sources)
    )
    assert [step[0].position for step in taken] == [256 * (i % 10) for i in range(25)]


class Stop(CheckpointRotation):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = True


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(8), torch.tensor(0)


def test_data_that_cannot_be_read_twice_and_steps_of_ones_own(tmp_path):
    class Other(Foreign):
        def train_dataloader(self):
            return DataLoader(Endless(), batch_size=4)

    with pytest.raises(UserError, match="reads training data twice, which DataLoader does not"):
        fit(None, tmp_path, WarmupCheck(), module=Other(0))
    module = Foreign(0)
    module.automatic_optimization = False
    with pytest.raises(UserError, match="by automatic optimisation, which this module does not"):
        fit(None, tmp_path, WarmupCheck(), module=module, gradient_clip_val=None)


def test_arguments():
    for wrong in ({"steps": 1}, {"data_share": 0.0}, {"data_share": 1.5}, {"band": (2.0, 1.0)}):
        with pytest.raises(UserError, match="expected"):
            WarmupCheck(**wrong)


def test_what_is_unusual_is_an_event(sources, tmp_path):
    module = make_module()
    step = module.training_step
    module.training_step = lambda *a: step(*a) * 3
    check_run(sources, tmp_path, module=module)
    (event,) = [event for event in events(tmp_path) if event["kind"] == "first_loss"]
    assert re.fullmatch(r"the first loss is 17\.\d+, a uniform guess's 5\.951", event["message"])
