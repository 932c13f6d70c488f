"""Held-out loss by source and position, and the validation before a run's first step."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from eval_ranks import run
from lightning import Callback
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from tiny import make_data, make_module, make_stages, make_trainer
from torch.utils.data import DataLoader
from warm_python import python

from callbacks import CheckpointRotation
from callbacks.eval_loss import EvalLoss
from smol.experiments import CSVLogger
from smol.runs import newest_checkpoint

BEFORE = "held_out/bits_per_byte/cats"


class Count(Callback):
    """The steps at which validation ran."""

    def __init__(self):
        self.steps = []

    def on_validation_start(self, trainer, module):
        self.steps.append(trainer.global_step)


def fit(folder, sources, steps, *callbacks, stages=None, resume=None, data=None, **kwargs):
    """Train with validation at every third step; returns the steps at which it validated."""
    count = Count()
    options = {"limit_val_batches": 1.0, "val_check_interval": 3} | kwargs
    trainer = make_trainer(
        folder, steps, callbacks=[count, *callbacks, CheckpointRotation(every=2)],
        logger=CSVLogger(str(folder)), **options,
    )  # fmt: skip
    trainer.fit(make_module(), data or make_data(sources, stages), ckpt_path=resume)
    return count.steps


def measured(folder, name="loss_by_position"):
    return json.loads((folder / f"{name}.json").read_text())


def held_out_rows(folder):
    """Steps and figures of all validations, as logged."""
    rows = [row for row in CSVLogger(str(folder)).rows() if row.get(BEFORE)]
    return {int(r["step"]): {k: float(v) for k, v in r.items() if v and "/" in k} for r in rows}


def test_losses_are_those_of_whole_logits(sources, tmp_path):
    data, module, callback = make_data(sources), make_module(), EvalLoss()
    trainer = make_trainer(
        tmp_path, 5, callbacks=[callback], logger=CSVLogger(str(tmp_path)), limit_val_batches=1.0
    )
    trainer.fit(module, data)
    cells = {}
    with torch.no_grad():
        for batch in data.val_dataloader():
            logits = module.decoder(batch.tokens, batch.positions, batch.documents).double()
            nll = -logits.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
            for row, source in enumerate(batch.sources.tolist()):
                for t, target in enumerate(batch.targets[row].tolist()):
                    position = int(batch.positions[row, t])
                    first = 2 ** (position.bit_length() - 1) if position else 0
                    if target != data.tokenizer.eos_id:
                        key = (data.source_names[source], first)
                        cells.setdefault(key, []).append(float(nll[row, t]))
    result = measured(tmp_path)["after"]
    assert (result["step"], result["context"]) == (5, 32)
    assert result["edges"] == [0, 1, 2, 4, 8, 16, 32]
    for name in ("cats", "dogs"):
        by_position = result["sources"][name]["by_position"]
        expected = [cells[name, first] for first in result["edges"][:-1]]
        assert by_position["tokens"] == [len(losses) for losses in expected]
        means = [sum(losses) / len(losses) for losses in expected]
        assert by_position["loss"] == pytest.approx(means, rel=1e-5)
        losses = [loss for bin_ in expected for loss in bin_]
        logged = held_out_rows(tmp_path)[5][f"held_out/loss/{name}"]
        assert logged == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result["all"]["loss"] == pytest.approx(held_out_rows(tmp_path)[5]["held_out/loss"])


class Noise(Callback):
    """Training that draws random numbers: any that another draws change the weights."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        for parameter in module.parameters():
            parameter.grad.add_(torch.randn_like(parameter), alpha=1e-3)


class State(Callback):
    """Weights, moments, generator and position after the last step."""

    def on_train_end(self, trainer, module):
        self.weights = [p.detach().clone() for p in module.parameters()]
        (optimizer,) = trainer.optimizers
        self.moments = [x for s in optimizer.state.values() for x in s.values()]
        self.random = torch.get_rng_state()
        self.position = trainer.datamodule.loader.position


def test_everything_after_it_is_bit_identical_with_and_without(sources, tmp_path):
    states, rows = [], []
    for name, callbacks in {"with": [EvalLoss()], "without": []}.items():
        torch.manual_seed(3)
        states.append(State())
        data = make_data(sources, micro_batch_tokens=128, num_workers=1)
        steps = fit(tmp_path / name, sources, 6, *callbacks, Noise(), states[-1], data=data)
        assert steps == ([0, 3, 6] if callbacks else [3, 6])
        logged = CSVLogger(str(tmp_path / name)).rows()
        rows.append([r for r in logged if r["step"] != "0"])
    a, b = states
    for x, y in zip(a.weights + a.moments, b.weights + b.moments, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(a.random, b.random)
    assert a.position == b.position
    for x, y in zip(*rows, strict=True):
        assert {k: v for k, v in x.items() if not k.startswith("held_out/loss/")} == y


class Shuffled(BoringModel):
    """Begins an iterator over validation data, which draws from the global generator."""

    def val_dataloader(self):
        return DataLoader(RandomDataset(32, 4), shuffle=True)

    def train_dataloader(self):
        return DataLoader(RandomDataset(32, 16), shuffle=True)


def test_in_any_trainer_it_validates_once_and_draws_no_number(tmp_path):
    weights = []
    for callbacks in ([EvalLoss()], []):
        torch.manual_seed(5)
        count = Count()
        trainer = make_trainer(
            tmp_path, 6, plugins=[], callbacks=[count, *callbacks], limit_val_batches=1.0,
            max_epochs=3, limit_train_batches=2,
        )  # fmt: skip
        trainer.fit(module := Shuffled())
        assert count.steps == ([0] if callbacks else [])
        weights.append(module.layer.weight.detach().clone())
    assert torch.equal(*weights)
    assert not (tmp_path / "loss_by_position.json").exists()


def test_without_validation_there_is_nothing_to_do(sources, tmp_path):
    assert fit(tmp_path, sources, 2, EvalLoss(), limit_val_batches=0) == []
    assert not (tmp_path / "loss_by_position.json").exists()


STAGES = {
    "one": {"start_step": 0, "cats": 1.0},
    "two": {"start_step": 4, "cats": 0.4, "dogs": 0.6, "context_length": 64},
}


def test_each_run_is_measured_once_before_its_first_step(sources, tmp_path):
    """A run, a run that continues it with other sources and another context, and a restart."""
    one, two = tmp_path / "one", tmp_path / "two"
    stages = make_stages(sources, one=STAGES["one"])
    data = make_data(sources, stages, longest_context=64)
    assert fit(one, sources, 4, EvalLoss(), data=data) == [0, 3, 4]
    assert measured(one)["before"]["step"] == 0
    last = held_out_rows(one)[4]

    def second(steps, resume):
        stages = make_stages(sources, **STAGES)
        data = make_data(sources, stages, shortest_context=32, context_length=64)
        return fit(two, sources, steps, callback := EvalLoss(), data=data, resume=resume), callback

    steps, callback = second(7, newest_checkpoint(one))
    assert steps == [4, 6, 7]
    before, after = (measured(two)[key] for key in ("before", "after"))
    assert (before["step"], before["context"], after["step"]) == (4, 64, 7)
    assert set(before["sources"]) == {"cats", "dogs"}
    row = held_out_rows(two)[4]
    assert row["train/tokens"] == 4 * 256
    assert callback.before["metrics"][BEFORE] == pytest.approx(row[BEFORE])
    assert row[BEFORE] != last[BEFORE]  # other blocks of the same text

    steps, restarted = second(9, newest_checkpoint(two))
    assert steps == [9]
    assert restarted.before == callback.before
    assert measured(two)["before"] == before
    assert list(held_out_rows(two)) == [4, 6, 7, 9]


def test_a_run_that_died_goes_on_as_if_it_had_not(sources, tmp_path):
    class Bomb(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            if trainer.global_step == 5:
                raise RuntimeError("lost")

    whole, broken = tmp_path / "whole/run", tmp_path / "broken/run"
    fit(whole, sources, 8, EvalLoss())
    with pytest.raises(RuntimeError, match="lost"):
        fit(broken, sources, 8, EvalLoss(), Bomb())
    fit(broken, sources, 8, EvalLoss(), resume=newest_checkpoint(broken))
    assert CSVLogger(str(whole)).rows() == CSVLogger(str(broken)).rows()
    assert measured(whole) == measured(broken)


def test_state_is_json(sources, tmp_path):
    callback = EvalLoss()
    fit(tmp_path, sources, 1, callback)
    state = callback.state_dict()
    assert state["run"] == tmp_path.name
    assert json.loads(json.dumps(state)) == state


def test_without_at_start_there_is_no_before(sources, tmp_path):
    callback = EvalLoss(at_start=False)
    assert fit(tmp_path, sources, 3, callback) == [3]
    assert callback.before is None
    assert measured(tmp_path)["before"] is None
    again = EvalLoss()  # it is too late now: the run has begun
    assert fit(tmp_path, sources, 6, again, resume=newest_checkpoint(tmp_path)) == [6]
    assert again.before is None


def test_nothing_of_a_batch_is_kept(sources, tmp_path):
    class Look(Callback):
        alive = None

        def on_validation_batch_start(self, *_):
            assert self.alive is None or self.alive() is None

        def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.alive = weakref.ref(outputs["nll"])

    look = Look()
    data = make_data(sources, micro_batch_tokens=64)
    fit(tmp_path, sources, 1, EvalLoss(), look, data=data)
    assert look.alive is not None


def test_the_command_validate_leaves_the_figures_of_the_run_alone(sources, tmp_path):
    fit(tmp_path, sources, 3, EvalLoss())
    figures = measured(tmp_path)
    trainer = make_trainer(tmp_path, 3, callbacks=[EvalLoss()], limit_val_batches=1.0)
    data = make_data(sources, shortest_context=32, longest_context=32, context_length=64)
    trainer.validate(make_module(), data, newest_checkpoint(tmp_path), verbose=False)
    assert measured(tmp_path) == figures
    alone = measured(tmp_path, "loss_by_position_validate")
    assert alone["before"] is None
    assert alone["after"]["context"] == 64
    for name in ("loss_by_position", "loss_by_position_validate"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_two_ranks_equal_one(sources, tmp_path):
    """The last batch of the second rank holds no target."""
    run(sources, tmp_path / "one", micro=64)
    script = Path(__file__).with_name("eval_ranks.py")
    done = python(script, sources, tmp_path / "two", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = measured(tmp_path / "one"), measured(tmp_path / "two")
    for key in ("before", "after"):
        assert one[key]["edges"] == two[key]["edges"]
        for name in ("cats", "dogs"):
            a, b = (m[key]["sources"][name]["by_position"] for m in (one, two))
            assert a["tokens"] == b["tokens"]
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
