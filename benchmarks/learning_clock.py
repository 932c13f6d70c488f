"""How much was learned after how many seconds: a clock, and a callback that reads it.

``learning_speed.py`` names the callback in a run of ``train.py``; its peer reads the same clock.
"""

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.parts.loop_timer import synchronize

Kind = Literal["wall", "processor"]
TIMES = {"wall": time.perf_counter, "processor": time.process_time}


class Clock:
    """Seconds while it runs; what the device still has to do is waited for.

    Args:
        kind: ``wall``, or ``processor``: the time of this process on all processors together, which
            other processes disturb less.
        device: Whose work belongs to the time.
    """

    def __init__(self, kind: Kind, device: torch.device):
        self._time, self._device = TIMES[kind], device
        self._seconds, self._began = 0.0, None

    def start(self) -> None:
        """Go on, if it does not run."""
        if self._began is None:
            synchronize(self._device)
            self._began = self._time()

    def stop(self) -> None:
        """Stand still."""
        self._seconds, self._began = self.read(), None

    def read(self) -> float:
        """Seconds so far."""
        if self._began is None:
            return self._seconds
        synchronize(self._device)
        return self._seconds + self._time() - self._began


class Curve:
    """What a training has reached, and when; the first step is not timed, nor is validation.

    The first step compiles and touches memory for the first time. In a probe, which is short, the
    first step of each shape of a batch is left out as well, and the seconds of a step are kept by
    stage.

    Args:
        file: Where :meth:`write` puts it, as JSON.
        kind: Of the clock.
        device: Of the training.
        probe: Whether this is one.
    """

    def __init__(self, file: Path, kind: Kind, device: torch.device, probe: bool = False):
        self.file, self.probe, self.clock = Path(file), probe, Clock(kind, device)
        self.rows: list[dict[str, float]] = []
        self._by_stage: dict[str, list[float]] = defaultdict(list)
        self._shape: Any = None
        self._warming, self._last, self._tokens, self._untimed = False, 0.0, 0, 0

    def begin(self, shape: Any) -> None:
        """A step with batches of this shape begins."""
        if self._shape is None or (self.probe and shape != self._shape):
            self._warming = True
            self.clock.stop()
        elif not self._warming:
            self.clock.start()  # it stood still for validation
        self._shape = shape

    def end(self, stage: str, tokens: int) -> None:
        """A step has ended, with so many tokens since the beginning."""
        if self._warming:
            self._warming = False
            self._untimed += tokens - self._tokens
            self.clock.start()
        elif self.probe:
            self._by_stage[stage].append(self.clock.read() - self._last)
        if self.probe:
            self._last = self.clock.read()
        self._tokens = tokens

    def reached(self, step: int, bits_per_byte: float) -> None:
        """Held-out text was measured, with the clock standing still since before that."""
        now = {"step": step, "tokens": self._tokens, "seconds": self.clock.read()}
        self.rows.append(now | {"bits_per_byte": bits_per_byte})

    def write(self, **more: float) -> None:
        """Write the file: ``rows``, ``step_seconds`` by stage, timed tokens and their seconds."""
        self.clock.stop()
        steps = {stage: sum(each) / len(each) for stage, each in self._by_stage.items()}
        timed = {"tokens": self._tokens - self._untimed, "seconds": self.clock.read()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps({"rows": self.rows, "step_seconds": steps} | timed | more))


class LearningCurve(Callback):
    """Keeps a :class:`Curve` of a run of ``train.py``.

    Args:
        file: See :class:`Curve`; so are the others.
        kind: ``wall`` or ``processor``.
        probe: Whether the run is one.
    """

    order = 900  # the last: others' work in a step belongs to the step

    def __init__(self, file: str, kind: Kind = "wall", probe: bool = False):
        self.file, self.kind, self.probe = Path(file), kind, probe
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.curve = Curve(self.file, self.kind, trainer.strategy.root_device, self.probe)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.curve.begin((tuple(batch.tokens.shape), batch.accumulation))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.curve.end(batch.stage, batch.next_position)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.curve.clock.stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reached = float(trainer.callback_metrics["held_out/bits_per_byte"])
        self.curve.reached(trainer.global_step, reached)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.curve.write(parameters=sum(p.numel() for p in pl_module.decoder.parameters()))
