"""How fast the run is, and how much of the device it uses."""

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.events import record
from callbacks.parts.loop_timer import LoopTimer, synchronize
from smol.errors import UserError
from smol.model.flops import flops_per_token, flops_per_token_causal
from smol.model.peak_flops import peak_flops


class Throughput(Callback):
    """Logs speed, where a step's time goes, utilisation, cost so far and time left.

    Each figure is of the optimiser steps since the last logged one; validation, checkpoints and the
    first step (compilation, first touch of memory) are left out of the time. All are named
    ``throughput/...``: ``steps_per_second``, ``step_seconds`` and its parts ``data_seconds`` (the
    process waits for a batch) and ``compute_seconds`` (the rest), ``eta_seconds``; with a batch of
    tokens ``tokens_per_second`` and ``tokens_per_second_per_device``; with a decoder
    ``attended_tokens`` (mean of a token, itself included) and ``model_flops`` (training operations
    of the run so far by PaLM's convention, restarts included).

    Utilisation (MFU) is a fraction of the peak of all devices, dense bfloat16 whatever the run
    computes in, and only logged where that is known. ``mfu_palm`` counts attention over the whole
    context (https://arxiv.org/abs/2204.02311, appendix B; comparable with published figures),
    ``mfu_causal`` over what is before a token, ``mfu_documents`` over what is before it in its own
    document.

    .. code-block:: yaml

        callbacks:
          throughput:
            class_path: callbacks.Throughput
            init_args: {peak_flops: 989.4e+12}

    Args:
        peak_flops: Operations per second of one device; by default from the table
            ``smol.model.peak_flops``, which knows no processors.
    """

    order = 200

    def __init__(self, peak_flops: float | None = None):
        if peak_flops is not None and peak_flops <= 0:
            raise UserError(
                f"Throughput peak_flops is {peak_flops:g}, expected operations per second, "
                "as 989e12"
            )
        self.peak_flops = peak_flops
        self.model_flops = 0.0
        self._timer: LoopTimer | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._device = trainer.strategy.root_device
        self._peak = self.peak_flops
        if self._peak is None and self._device.type == "cuda":
            self._peak = peak_flops(torch.cuda.get_device_name(self._device))
        self._decoder = getattr(pl_module, "decoder_config", None)
        self._ranks = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        self._step, self._steps_timed, self._impossible = trainer.global_step, 0, False
        self._window: _Window | None = None
        self._timer = trainer.profiler = LoopTimer(trainer.profiler, self._device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._count(batch)
        step = trainer.global_step
        moved, self._step = step > self._step, step
        if not moved:
            return  # not the last micro-batch, or a step that was dropped or undone
        if self._window is None:
            synchronize(self._device)  # once: the first step is not timed
            self._window = _Window(*self._timer.read())
            self._paused_before = self._timer.paused_seconds
            return
        self._window.steps += 1
        self._steps_timed += 1
        if step % trainer.log_every_n_steps == 0:
            synchronize(self._device)
            pl_module.log_dict(self._measure(trainer))
            self._window = _Window(*self._timer.read())

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._timer is not None:
            self._timer.pause("validation")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._timer is not None:
            trainer.profiler, self._timer = self._timer.inner, None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"model_flops": self.model_flops}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.model_flops = state_dict["model_flops"]

    def _count(self, batch: Any) -> None:
        tokens = getattr(batch, "tokens", None)
        if tokens is None:
            return
        number, context = tokens.numel() * self._ranks, tokens.shape[1]
        palm = number * flops_per_token(self._decoder, context) if self._decoder else 0.0
        self.model_flops += palm
        window = self._window
        if window is None:
            return
        window.tokens += number
        if self._decoder:
            window.palm += palm
            window.causal += number * flops_per_token_causal(self._decoder, context)
            window.pairs = window.pairs + attended_pairs(batch.documents)

    def _measure(self, trainer: Trainer) -> dict[str, float]:
        window, (now, data) = self._window, self._timer.read()
        seconds, data_seconds = now - window.began, data - window.data_began
        step_seconds = seconds / window.steps
        metrics = {
            "steps_per_second": 1 / step_seconds,
            "step_seconds": step_seconds,
            "data_seconds": data_seconds / window.steps,
            "compute_seconds": (seconds - data_seconds) / window.steps,
        }
        if trainer.max_steps > 0:
            paused = self._timer.paused_seconds - self._paused_before
            between = paused / self._steps_timed
            metrics["eta_seconds"] = (trainer.max_steps - self._step) * (step_seconds + between)
        if window.tokens:
            rate = window.tokens / seconds
            metrics["tokens_per_second"] = rate
            metrics["tokens_per_second_per_device"] = rate / trainer.world_size
        if window.tokens and self._decoder:
            attended = self._attended(trainer)
            # PaLM's formula is linear in the tokens that one attends to.
            documents = window.tokens * flops_per_token(self._decoder, attended)
            flops = {"palm": window.palm, "causal": window.causal, "documents": documents}
            metrics |= {"attended_tokens": attended, "model_flops": self.model_flops}
            if self._peak is not None:
                possible = seconds * self._peak * trainer.world_size
                metrics |= {f"mfu_{name}": value / possible for name, value in flops.items()}
                self._check(trainer, metrics["mfu_documents"])
        return {f"throughput/{name}": value for name, value in metrics.items()}

    def _attended(self, trainer: Trainer) -> float:
        """Tokens that a token attends to, the mean over all ranks."""
        pairs = trainer.strategy.reduce(self._window.pairs.double(), reduce_op="sum")
        return float(pairs) / self._window.tokens

    def _check(self, trainer: Trainer, utilisation: float) -> None:
        if utilisation > 1 and not self._impossible:
            self._impossible = True
            message = (
                f"{utilisation:.1%} of the peak is more than there is; "
                f"peak_flops {self._peak:.4g} is too low for this device"
            )
            record(trainer, "impossible_mfu", message, mfu=utilisation, peak_flops=self._peak)


@dataclass
class _Window:
    """What was done since the last logged step."""

    began: float
    data_began: float
    steps: int = 0
    tokens: int = 0
    palm: float = 0.0
    causal: float = 0.0
    pairs: Tensor | int = 0


def attended_pairs(documents: Tensor) -> Tensor:
    """Pairs of a token and one it attends to, itself included; computed without a synchronisation.

    Args:
        documents: Number of the document of each token, ``(rows, time)``; neighbours of the same
            number are one document.

    Returns:
        A scalar, int64.
    """
    time = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.zeros_like(documents, dtype=torch.int64)
    begins[:, 1:] = time[1:] * (documents[:, 1:] != documents[:, :-1])
    return (time - begins.cummax(dim=1).values + 1).sum()
