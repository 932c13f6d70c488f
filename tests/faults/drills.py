"""Runs with faults, and the runs that they have to equal."""

import json
from pathlib import Path

import torch
from lightning import Callback
from tiny import make_data, make_module, make_stages, make_trainer

from callbacks.events import Events
from callbacks.fault_injection import FaultInjection
from callbacks.nan_rollback import NaNRollback
from callbacks.parts.faults import Fault

STEP = 256  # tokens of an optimiser step
GUARD = {
    "spike": 10.0,
    "window": 8,
    "warmup": 6,
    "snapshot_every": 5,
    "snapshots": 3,
    "age": 4,
    "recurs": 3,
}
STAGES = {
    "one": {"start_step": 0, "cats": 0.7, "dogs": 0.3},
    "two": {"start_step": 18, "cats": 0.2, "dogs": 0.8},
}


class Watch(Callback):
    """Losses of accepted steps by step, and an end to runs that come to none."""

    def __init__(self, limit=200):
        self.losses, self.stages, self.limit = {}, {}, limit

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx > self.limit:
            raise RuntimeError("the run does not come to an end")
        self.losses[trainer.global_step, batch.micro] = float(outputs["loss"])
        self.stages[batch.position] = batch.stage


class Omit:
    """Data that never contains some optimiser steps, by their position."""

    def __init__(self, data, positions):
        self.data, self.positions = data, set(positions)

    def __enter__(self):
        from smol.data import loader

        self.sampler, inner = loader._FromPosition, loader._FromPosition
        positions = self.positions

        class Sampler(inner):
            def __iter__(self):
                return (key for key in super().__iter__() if key[0] not in positions)

        loader._FromPosition = Sampler

    def __exit__(self, *error):
        from smol.data import loader

        loader._FromPosition = self.sampler


def train(folder: Path, sources: Path, steps=24, faults=(), omit=(), guard=None, **kwargs):
    """Train the tiny model; with ``omit``, on data without those optimiser steps, unguarded.

    Returns:
        The trainer; its module, events and watch are attributes of it.
    """
    watch = Watch()
    callbacks = [*kwargs.pop("callbacks", [])]
    if not omit:
        faults = [Fault(**fault) for fault in faults]
        guards = [] if guard is False else [NaNRollback(**GUARD | (guard or {}))]
        callbacks += [FaultInjection(faults), *guards, Events()]
    callbacks += kwargs.pop("monitors", [])
    decoder = kwargs.pop("decoder", {})
    stages = make_stages(sources, **kwargs.pop("stages", {"one": STAGES["one"]}))
    data = make_data(sources, stages, micro_batch_tokens=kwargs.pop("micro", STEP // 2))
    data.num_workers = kwargs.pop("num_workers", 0)
    resume = kwargs.pop("resume", None)
    trainer = make_trainer(folder, steps, callbacks=[*callbacks, watch], **kwargs)
    module = make_module(**decoder)
    torch.manual_seed(0)
    with Omit(data, omit):
        trainer.fit(module, data, ckpt_path=resume)
    trainer.watch, trainer.module = watch, module
    return trainer


def weights(trainer) -> list:
    state = trainer.module.state_dict()
    return [state[name] for name in sorted(state)]


def equal(one, other) -> bool:
    """Whether two runs ended with the same weights and moments, bit for bit."""
    moments = [
        [state[key] for state in trainer.optimizers[0].state.values() for key in sorted(state)]
        for trainer in (one, other)
    ]
    pairs = [*zip(weights(one), weights(other), strict=True), *zip(*moments, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


def steps(first: int, last: int) -> range:
    """Positions of the optimiser steps ``first`` to ``last`` of a run without faults."""
    return range(first * STEP, (last + 1) * STEP, STEP)


def events(folder: Path, *kinds: str) -> list[dict]:
    """The events of these kinds; of a guard if none is named."""
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] in (kinds or ("dropped_step", "rollback"))]
