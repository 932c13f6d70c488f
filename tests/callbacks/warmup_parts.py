"""Runs with and without a check, and what they leave behind; as a script, of several ranks."""

import json
import os
import re
import signal
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning import Callback, LightningModule
from tiny import make_data, make_stages, make_trainer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from callbacks import CheckpointRotation
from callbacks.parts.trial_steps import TrialSteps
from callbacks.warmup_check import WarmupCheck
from smol.data.loader import _MicroBatches
from smol.errors import UserError
from smol.experiments import CSVLogger
from smol.model import DecoderConfig
from smol.modules import LanguageModeling
from smol.optim import WSD, OptimizerConfig
from smol.parallel import FSDP2Strategy
from smol.parallel.processes import leave_groups_at_exit

STAGES = {
    "one": {"start_step": 0, "cats": 0.7, "dogs": 0.3},
    "two": {"start_step": 3, "cats": 0.2, "dogs": 0.8, "context_length": 64},
}
TRIAL = {"steps": 10, "data_share": 0.8}  # four of six steps, again and again


class Dropout(LanguageModeling):
    """The tiny decoder with dropout, so that every step draws random numbers."""

    def __init__(self):
        shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
        super().__init__(
            decoder=DecoderConfig(vocab_size=384, intermediate_size=64, nope=2, **shape),
            schedule=WSD(warmup_steps=3),
            optimizer=OptimizerConfig(learning_rate=0.01),
        )

    def configure_model(self):
        if self.decoder is None:
            super().configure_model()
            embedding = self.decoder.model.embed_tokens
            embedding.register_forward_hook(lambda module, inputs, output: F.dropout(output, 0.1))


class Foreign(LightningModule):
    """A module of another's that keeps all kinds of state."""

    def __init__(self, workers):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 4)
        )
        self.mean, self.workers = MeanMetric(), workers
        self.losses, self.sums, self.total = [], {"loss": {"all": []}}, torch.zeros(())
        self.idle = nn.Parameter(torch.ones(()))  # no optimiser has it, so its gradient grows

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        loss = F.cross_entropy(self.layers(inputs) * self.idle, labels)
        self.losses.append(loss.item())
        self.sums["loss"]["all"].append(len(self.losses))
        self.total += loss.detach()
        self.count = getattr(self, "count", 0) + 1
        self.mean(loss)
        values = {"loss": loss, "total": self.total.clone(), "count": float(self.count)}
        self.log_dict(values | {"kept": float(len(self.sums["loss"]["all"]))})
        self.log("idle", self.idle.grad if self.count > 1 else 0.0)
        if self.trainer.global_step >= 5:
            self.log("late", loss, on_step=True, on_epoch=True)
        if self.count == 25:
            self.trainer.should_stop = True
        self.log("epoch", loss, on_step=False, on_epoch=True)
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.logger.log_metrics({"own": loss.item()}, self.trainer.global_step)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.layers.parameters(), lr=0.5, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self):
        inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
        labels = inputs[:, :4].argmax(1)
        workers = {"num_workers": self.workers, "persistent_workers": self.workers > 0}
        return DataLoader(TensorDataset(inputs, labels), batch_size=4, shuffle=True, **workers)


def timed(metric):
    """Whether a metric is another each time."""
    return metric.startswith("throughput/")


class Hooks(Callback):
    """What a callback is told and can see."""

    def __init__(self):
        self.told = []

    def _tell(self, name, trainer, *rest):
        loop = trainer.fit_loop.epoch_loop
        counts = trainer.global_step, loop.batch_idx, loop._batches_that_stepped
        settings = trainer.accumulate_grad_batches, trainer.num_training_batches
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if not timed(k)}
        self.told.append([name, *counts, *settings, trainer.should_stop, metrics])


for _name in (
    *("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad"),
    *("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end"),
):
    setattr(Hooks, _name, partialmethod(Hooks._tell, _name))


def fit(sources, folder, check=None, steps=6, module=None, data=None, callbacks=(), **kwargs):
    """Train the tiny decoder on its stages, saving each step.

    Returns:
        What outlives the run: weights, the state of random numbers, what callbacks were told.
    """
    torch.manual_seed(1)
    hooks, module = Hooks(), module or Dropout()
    callbacks = [*([check] if check else []), hooks, *callbacks, CheckpointRotation(1, keep=99)]
    trainer = make_trainer(
        folder, steps, logger=CSVLogger(str(folder)), callbacks=callbacks, **kwargs
    )
    trainer.fit(module, data)
    weights = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    return [p.detach() for p in weights], torch.get_rng_state(), hooks.told


def tiny_data(sources, **kwargs):
    """Two stages that differ in context and, since rows are single, in accumulation."""
    options = {"micro_batch_tokens": 32, "global_batch_tokens": 192} | kwargs
    return make_data(sources, make_stages(sources, **STAGES), **options)


def files(folder):
    """Every file of a run's folder by name, but for the report, the times and the random names."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = re.sub(r"(step-\d+)-\w+", r"\1", str(path.relative_to(folder)))
        if path.name == "manifest.json":
            found[name] = json.loads(path.read_text()) | {"created": None}
        elif "writers" in path.parts:
            continue
        elif path.is_file() and path.name not in ("warmup_check.json", "COMMITTED"):
            found[name] = path.read_bytes()
    return found


def assert_same(a, b):
    """Two runs left the same."""
    for x, y in zip(a[0], b[0], strict=True):
        assert torch.equal(x, y)
    assert torch.equal(a[1], b[1])
    assert a[2] == b[2]


def report(folder):
    """What the check wrote, by the name of each check."""
    content = json.loads((folder / "warmup_check.json").read_text())
    return content | {check["name"]: check for check in content["checks"]}


class Taken(list):
    """The micro-batches of each step of the checks, its learning rate, and the count after it."""

    def __init__(self):
        super().__init__()
        self.rates, self.counts = [], []


@pytest.fixture
def taken(monkeypatch):
    steps, take = Taken(), TrialSteps.take

    def remember(self, micro_batches):
        steps.append(micro_batches)
        steps.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        result = take(self, micro_batches)
        steps.counts.append(self.trainer.global_step)
        return result

    monkeypatch.setattr(TrialSteps, "take", remember)
    return steps


@contextmanager
def damaged(change):
    """Batches of our data are changed after they are read; ``change`` also gets their number."""
    read, count = _MicroBatches.__getitem__, iter(range(10**6))

    def read_and_change(self, key):
        batch = read(self, key)
        change(batch, next(count))
        return batch

    _MicroBatches.__getitem__ = read_and_change
    try:
        yield
    finally:
        _MicroBatches.__getitem__ = read


def strange_token(batch, count):
    batch.tokens[0, 5] = batch.targets[0, 4] = 5000


# -- a script, of which torchrun makes ranks -------------------------------------------------------


def kill_in_step(number):
    """Let the process die when it is about to take a step of the trial."""
    take, taken = TrialSteps.take, []

    def die(self, micro_batches):
        taken.append(micro_batches)
        if len(taken) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return take(self, micro_batches)

    TrialSteps.take = die


@contextmanager
def wrong_sums(rank):
    """One process gets another sum than all others."""
    all_reduce = dist.all_reduce

    def wrong(tensor, *args, **kwargs):
        result = all_reduce(tensor, *args, **kwargs)
        if dist.get_rank() == rank:
            tensor.view(-1)[-1] += 1
        return result

    dist.all_reduce = wrong
    try:
        yield
    finally:
        dist.all_reduce = all_reduce


def run(sources, folder, strategy="auto", devices=1, check=None, fault=None):
    """Train; leaves what outlived the run, or the error, beside its folder."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    data = tiny_data(sources, global_batch_tokens=384)
    options = {"strategy": FSDP2Strategy() if strategy == "fsdp2" else strategy, "devices": devices}
    outcome = Path(f"{folder}.rank{rank}")
    outcome.parent.mkdir(parents=True, exist_ok=True)
    faulty = nullcontext()
    if fault == "kill":
        kill_in_step(5)
    elif fault == "sums":
        faulty = wrong_sums(1)
    elif fault == "token" and rank == 1:
        faulty = damaged(strange_token)
    elif fault == "same rows":
        layout = data.layout
        data.layout = lambda: replace(layout(), rank=0)
    try:
        with faulty:
            check = WarmupCheck(**check) if check else None
            torch.save(fit(sources, folder, check, data=data, **options), outcome)
    except UserError as error:
        outcome.write_text(str(error))


if __name__ == "__main__":
    for job in json.loads(sys.argv[3]):
        run(Path(sys.argv[1]), Path(sys.argv[2], job.pop("folder")), **job)
    leave_groups_at_exit()
