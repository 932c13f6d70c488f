"""Optimiser steps that a run takes on trial, and of which nothing is left afterwards."""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.loops.progress import _BatchProgress, _SchedulerProgress
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from callbacks.parts.collectives import reduce_processes
from callbacks.parts.loop_timer import synchronize
from smol.data.loader import PositionLoader
from smol.modules.snapshot import Snapshot

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class TrialSteps:
    """Takes optimiser steps with the loop, strategy, precision and clipping of the run."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.device = trainer, trainer.strategy.root_device

    def take(self, micro_batches: list[Any]) -> tuple[float | None, float]:
        """Take one optimiser step on batches as the loader made them.

        Returns:
            The loss, of all processes, or ``None`` if the module dropped the step; and the seconds
            it took until the device was done.
        """
        began = time.perf_counter()
        trainer, before = self.trainer, self.trainer.global_step
        # Lightning takes a step where its count of micro-batches is a multiple of their number.
        trainer.accumulate_grad_batches = number = len(micro_batches)
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        progress.ready = -(-progress.ready // number) * number
        loss = torch.zeros((), device=self.device)
        for batch in micro_batches:
            loss += self._micro_step(batch).float()
        loss = float(reduce_processes(trainer, loss, "mean"))
        synchronize(self.device)
        dropped = trainer.global_step == before
        return None if dropped else loss, time.perf_counter() - began

    def _micro_step(self, batch: Any) -> Tensor:
        """What the training loop does with a batch, but for its callbacks and its logging."""
        trainer, loop = self.trainer, self.trainer.fit_loop.epoch_loop
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        loop.batch_progress.increment_ready()
        trainer._logger_connector.on_batch_start(batch)
        arguments = loop._build_kwargs(OrderedDict(), batch, loop.batch_idx)
        optimization = loop.automatic_optimization
        outputs = optimization.run(trainer.optimizers[0], loop.batch_idx, arguments)
        loop.update_lr_schedulers("step", update_plateau_schedulers=False)
        trainer._logger_connector.on_batch_end()
        return outputs.get("loss", torch.zeros(()))

    def any_process(self, condition: bool) -> bool:
        """Whether it holds on any process; all have to ask."""
        number = torch.tensor(float(condition), device=self.device)
        return float(reduce_processes(self.trainer, number, "sum")) > 0


@contextmanager
def trial_steps(trainer: Trainer, pl_module: LightningModule) -> Iterator[TrialSteps]:
    """Begin a trial between two steps of a run; at its end the run is where it was, bit for bit.

    Weights, buffers, moments, schedules, random states, the position in the data and the module's
    attributes (numbers, tensors, and lists, dictionaries and sets of them) return. No callback,
    logger or profiler hears of the steps: others stand in for them, and for the loop's counters.
    """
    loop, loader = trainer.fit_loop.epoch_loop, getattr(trainer.datamodule, "loader", None)
    snapshot, put_back = Snapshot(trainer, pl_module), _keep_attributes(pl_module)
    if isinstance(loader, PositionLoader):
        curriculum, position = loader.curriculum, loader.position
    stand_ins = {
        "callbacks": [],
        "loggers": [DummyLogger() for _ in trainer.loggers],
        "profiler": PassThroughProfiler(),
        "_logger_connector": _LoggerConnector(trainer),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "should_stop": False,
    }
    loop_stand_ins = {
        "batch_progress": _BatchProgress(),
        "scheduler_progress": _SchedulerProgress(),
        "automatic_optimization": _AutomaticOptimization(trainer),
        "_results": _ResultCollection(training=True),
        "_batches_that_stepped": loop._batches_that_stepped,
    }
    with ExitStack() as stack:
        stack.enter_context(_replaced(trainer, stand_ins))
        stack.enter_context(_replaced(loop, loop_stand_ins))
        stack.enter_context(_replaced(trainer.fit_loop, {"max_batches": float("inf")}))
        try:
            yield TrialSteps(trainer)
        finally:
            # Without communication, since after a failure other processes may be elsewhere.
            put_back()
            snapshot.restore(trainer, pl_module)
            pl_module.zero_grad()
            if isinstance(loader, PositionLoader):
                loader.consume(position)
                loader.replan(curriculum)
    if isinstance(trainer.strategy.model, DistributedDataParallel):
        # After its first step DDP lays its buckets out anew, and three processes and more then add
        # up in another order. A new wrapper begins as the run's own did.
        trainer.strategy.model = trainer.strategy.model.module
        trainer.strategy.configure_ddp()


@contextmanager
def _replaced(owner: Any, stand_ins: dict[str, Any]) -> Iterator[None]:
    """Let other attributes of an object stand in for its own."""
    own = {name: getattr(owner, name) for name in stand_ins}
    for name, value in stand_ins.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(owner, name, value)


def _keep_attributes(module: nn.Module) -> Callable[[], None]:
    """A function that puts the attributes of all submodules back.

    Those are what their authors gave them, such as sums to log and the states of metrics.
    """
    kept = []
    for part in module.modules():
        own = {k: v for k, v in vars(part).items() if k not in _OF_EVERY_MODULE}
        kept.append((vars(part), own, _keep_content(own)[1:]))

    @torch.no_grad()
    def put_back() -> None:
        for attributes, own, refills in kept:
            for name in attributes.keys() - own.keys() - _OF_EVERY_MODULE:
                del attributes[name]
            attributes.update(own)
            for refill in refills:
                refill()

    return put_back


def _keep_content(value: Any) -> list[Callable[[], Any]]:
    """Functions that put the content of a tensor or container back into it, and into what it holds.

    Parameters are in no need of it.
    """
    if isinstance(value, nn.Parameter):
        return []
    if isinstance(value, Tensor):
        content = value.detach().clone()
        return [lambda: value.copy_(content)]
    if not isinstance(value, list | deque | dict | set):
        return []
    members = dict(value) if isinstance(value, dict) else list(value)

    def refill() -> None:
        value.clear()
        (value.extend if isinstance(value, list | deque) else value.update)(members)

    inside = value.values() if isinstance(value, dict) else value
    return [refill, *chain.from_iterable(map(_keep_content, inside))]
