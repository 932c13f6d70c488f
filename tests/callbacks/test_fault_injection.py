"""Faults strike when and where they should, once, and leave nothing behind."""

import inspect
import json
import resource
from pathlib import Path

import pytest
import torch
import yaml
from fault_parts import (
    Fault,
    FaultInjection,
    Plain,
    fit,
    train,  # noqa: F401
)
from jsonargparse import ArgumentParser
from lightning import Callback
from tiny import make_module
from warm_python import python

from callbacks import Events
from callbacks.parts.fault_kinds import KINDS
from smol.errors import UserError

# -- once ------------------------------------------------------------------------------------------


class GoBack(Callback):
    """Takes the run back to an earlier step, once."""

    def __init__(self, at, to):
        self.at, self.to, self.steps = at, to, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps.append(trainer.global_step)
        if trainer.global_step == self.at:
            self.at = None
            total = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer
            total.step.total.completed = self.to


def strikes(folder):
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [e["step"] for e in events if e["kind"] == "fault"]


@pytest.mark.parametrize(
    ("times", "expected"), [(1, [3]), (2, [3, 4]), (3, [3, 4, 3]), (9, [3, 4, 3, 4, 5, 6, 7])]
)
def test_a_run_that_goes_back_meets_no_more_faults_than_it_should(tmp_path, times, expected):
    back, fault = GoBack(5, 2), Fault("slow_step", 3, seconds=0, times=times)
    options = {"steps": 8, "callbacks": [back, Events()], "accumulate_grad_batches": 1}
    fit(tmp_path, fault, **options)
    assert back.steps == [1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8]
    assert strikes(tmp_path) == expected
    fit(tmp_path, fault, **options)  # the same run again, from its first step
    again = strikes(tmp_path)[len(expected) :]
    assert len(expected) + len(again) == min(times, 7 + 5)


def test_a_strike_is_an_event(tmp_path):
    faults = [Fault("nan_gradient", 1, times=2), Fault("slow_step", 1, micro=1, seconds=0)]
    fit(tmp_path, *faults, callbacks=[Events()])
    events = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    found = [e for e in events if e["kind"] == "fault"]
    assert [(e["step"], e["fields"]["fault"], e["fields"]["strike"]) for e in found] == [
        (1, "slow_step", 1), (1, "nan_gradient", 1), (2, "nan_gradient", 2)
    ]  # fmt: skip
    assert found[0]["message"] == "slow_step, step 1, rank 0, micro 1, seconds 0 (strike 1 of 1)"
    rows = map(json.loads, (tmp_path / "faults.jsonl").read_text().splitlines())
    assert [(row["step"], row["rank"]) for row in rows] == [(1, 0), (1, 0), (2, 0)]


def test_faults_that_wait_change_nothing(train):
    _, trained = train(folder="other")
    _, module = train(*(Fault(kind, 10**6) for kind in KINDS))
    for a, b in zip(trained.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_faults_draw_no_random_numbers(train):
    train(folder="other")
    expected = torch.get_rng_state()
    kinds = KINDS.keys() - {"kill", "lost_device"}
    train(*(Fault(kind, 1, times=2) for kind in sorted(kinds)))
    assert torch.equal(torch.get_rng_state(), expected)


def test_nothing_is_left_behind_by_a_run_that_fails(tmp_path):
    class Fail(Callback):
        def on_before_optimizer_step(self, trainer, *_):
            if trainer.global_step == 1:
                raise ValueError("something else")

    module, limit = Plain(), resource.getrlimit(resource.RLIMIT_FSIZE)
    faults = [Fault(kind, 1, micro=0) for kind in KINDS if KINDS[kind].when == "micro"]
    with pytest.raises(ValueError, match="something else"):
        fit(tmp_path, *faults, Fault("full_disk", 1), callbacks=[Fail()], module=module)
    assert "training_step" not in vars(module)
    assert not [m for m in module.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not [p for p in module.parameters() if p._backward_hooks]
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == limit


# -- other processes -------------------------------------------------------------------------------


KILLED = """
import sys
from pathlib import Path
from tiny import make_data, make_module, make_trainer
from callbacks import CheckpointRotation, Events
from callbacks.fault_injection import Fault, FaultInjection
from smol.runs import newest_checkpoint

sources, folder = map(Path, sys.argv[1:])
faults = FaultInjection([Fault("kill", 3, micro=1)])
trainer = make_trainer(folder, 5, callbacks=[faults, CheckpointRotation(every=2), Events()])
data = make_data(sources, micro_batch_tokens=128)
trainer.fit(make_module(), data, ckpt_path=newest_checkpoint(folder))
"""


@pytest.mark.slow
def test_a_killed_process_is_not_killed_again(sources, tmp_path):
    codes = [python("-c", KILLED, sources, tmp_path).returncode for _ in range(2)]
    assert codes == [-9, 0]
    rows = map(json.loads, (tmp_path / "faults.jsonl").read_text().splitlines())
    assert [(row["step"], row["rank"]) for row in rows] == [(3, 0)]
    events = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    told = [(event["kind"], event["step"]) for event in events if event["kind"] != "saved"]
    assert told == [
        ("start", 0), ("fault", 3), ("start", 2), ("end", 5)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_one_rank_of_two(sources, tmp_path, strategy):
    script = Path(__file__).with_name("fault_ranks.py")
    done = python(script, sources, tmp_path, strategy, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    zero, one = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    sharded = strategy == "fsdp2"

    # A reduced gradient in the process that was named; one before that where it ends up.
    assert (zero["gradients"][1], one["gradients"][1]) == (0, 1)
    assert (zero["gradients"][2], one["gradients"][2]) == ((1, 0) if sharded else (1, 1))
    assert (zero["gradients"][8], one["gradients"][8]) == (1, 1)
    for step in (0, 6, 7, 9, 10):
        assert zero["gradients"][step] == one["gradients"][step] == 0
    for step in (3, 5):  # from one process to all
        assert min(zero["gradients"][step], one["gradients"][step]) > 1
    assert zero["weights"] == [0] * 11
    assert [step for step, number in enumerate(one["weights"]) if number] == [4]
    assert zero["moments"] == [0] * 11
    assert [step for step, number in enumerate(one["moments"]) if number] == [6]
    # A weight that is sharded is gathered, so its loss is that of both.
    of_weight = [[4, 0], [4, 1]]
    assert one["losses"] == [[3, 0], *of_weight]
    assert zero["losses"] == [*(of_weight if sharded else []), [5, 1]]
    for rank in (zero, one):
        assert rank["largest"][7] > 1e3 > 1e2 > rank["largest"][6]
    assert one["full"] == [[9, 0], [9, 1]]
    assert zero["full"] == []

    # The first process tells of all; each remembers its own.
    rows = list(map(json.loads, (tmp_path / "faults.jsonl").read_text().splitlines()))
    assert sorted((row["step"], row["rank"]) for row in rows) == [
        (1, 1), (2, 1), (3, 1), (4, 1), (5, 0), (6, 1), (7, 1), (8, 0), (8, 1), (9, 1)
    ]  # fmt: skip
    assert strikes(tmp_path) == list(range(1, 10))


# -- configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "nan_gradent"}, "there is no fault 'nan_gradent'. Did you mean 'nan_gradient'?"),
        ({"kind": "banana"}, "there is no fault 'banana'. Expected one of nan_loss, inf_loss"),
        ({"kind": "kill", "step": -1}, "fault kill: step is -1, expected at least 0"),
        ({"kind": "nan_moment", "step": 0}, "step is 0, expected at least 1"),
        ({"kind": "kill", "rank": -1}, "rank is -1, expected at least 0"),
        ({"kind": "kill", "micro": -1}, "micro is -1, expected at least 0"),
        ({"kind": "kill", "times": 0}, "times is 0, expected at least 1"),
        ({"kind": "slow_step", "seconds": -1.0}, "seconds is -1.0, expected at least 0"),
        ({"kind": "kill", "value": 2.0}, "fault kill: it has no value; leave that out"),
        ({"kind": "nan_loss", "target": "x"}, "fault nan_loss: it has no target"),
        ({"kind": "nan_gradient", "micro": 1}, "fault nan_gradient: it has no micro"),
        ({"kind": "kill", "seconds": 1.0}, "fault kill: it has no seconds"),
        ({"kind": "nan_weight", "target": "*"}, "fault nan_weight: target '*': nothing to repeat"),
    ],
)
def test_a_mistake_is_one_line(fields, message):
    with pytest.raises(UserError) as caught:
        Fault(**({"step": 3} | fields))
    assert str(caught.value).startswith(message) or message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("nan_weight", 3, target="weigth"), "none of 4 parameters. Did you mean 'weight'?"),
        (Fault("nan_activation", 3, target="layer.2"), "Did you mean 'layers.2'?"),
        (Fault("kill", 3, rank=1), "fault kill: rank is 1, of 1 processes"),
        (Fault("nan_loss", 0, micro=2), "fault nan_loss: micro is 2, of 2 micro-batches"),
    ],
)
def test_what_is_not_there_is_told_before_the_first_step(tmp_path, fault, message):
    module = Plain()
    with pytest.raises(UserError) as caught:
        fit(tmp_path, fault, module=module)
    assert message in str(caught.value)
    assert module.batches == []


def test_a_module_that_is_not_called_is_told(sources, tmp_path):
    """The head of this decoder is a module whose weight alone is used."""
    module = make_module(tie_embeddings=False)
    with pytest.raises(UserError, match="'decoder.lm_head' did not strike: training_step did not"):
        fit(tmp_path, Fault("nan_activation", 1), sources=sources, module=module)


def test_the_same_fault_twice_is_refused():
    faults = [Fault("kill", 3), Fault("kill", 3, times=2)]
    with pytest.raises(UserError, match="is there 2 times; have one, with times"):
        FaultInjection(faults)


def test_the_example_of_the_docstring_can_be_parsed():
    text = inspect.getdoc(FaultInjection).split(".. code-block:: yaml")[1].split("Args:")[0]
    config = yaml.safe_load(text)
    config["callbacks"]["faults"]["class_path"] = "callbacks.fault_injection.FaultInjection"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=dict[str, Callback | None])
    injection = parser.instantiate_classes(parser.parse_object(config)).callbacks["faults"]
    assert [fault.kind for fault in injection.faults] == ["nan_gradient", "nan_activation", "kill"]
    assert str(injection.faults[1]) == (
        "nan_activation, step 200, rank 1, micro 2, target model.layers.3, value nan"
    )


def test_every_kind_is_explained():
    for kind in KINDS:
        assert f"``{kind}``" in FaultInjection.__doc__
