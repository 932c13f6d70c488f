"""Whether the logits stay where they are."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.events import record
from callbacks.parts.robust_window import RobustWindow


class ZLossMonitor(Callback):
    """Logs the scale of the logits and the part that z-loss plays; an event when they drift.

    A softmax does not mind if all its logits grow by the same number, so nothing but z-loss
    (https://arxiv.org/abs/2204.02311, section 5) holds them; in bfloat16 a logit beyond 64 is
    rounded to multiples of 0.5. The figures are those of the logged optimiser step, over all
    micro-batches and processes, in nats: ``z_loss/mean_square`` of the log-partition (what the
    coefficient multiplies), ``z_loss/log_partition_mean`` and ``_max``,
    ``z_loss/target_logit_rms`` (root mean square of the logits of the targets) and
    ``z_loss/share`` (of the objective, 0 to 1).

    An event ``z_loss_drift`` tells when the mean log-partition has been far from the median of
    earlier logged steps, or the target logits beyond ``limit``, for ``patience`` logged steps in a
    row. What was far never becomes part of the median.

    The module needs a submodule ``decoder`` that returns negative log-likelihood and log-partition
    of each token, zero where there is no target; with any other nothing is logged.

    .. code-block:: yaml

        callbacks:
          z_loss:
            class_path: callbacks.ZLossMonitor
            init_args: {threshold: 8.0, limit: 64.0}

    Args:
        threshold: How far is far, in standard deviations as estimated by the median deviation; one
            counts at least a tenth of the median, and 0.1 nats.
        limit: Largest root mean square of target logits, in nats.
        window: Logged steps whose median is compared with.
        least: Logged steps before that is done.
        patience: Logged steps in a row.
    """

    order = 200

    def __init__(
        self,
        threshold: float = 8.0,
        limit: float = 64.0,
        window: int = 100,
        least: int = 20,
        patience: int = 3,
    ):
        self.threshold, self.limit = threshold, limit
        self.patience = patience
        self._usual = RobustWindow(window, least, relative=0.1, absolute=0.1)
        self._far = 0
        self._hook: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sums: Tensor | None = None
        self._largest: Tensor | None = None
        self._step, self._wanted = trainer.global_step, False
        decoder = getattr(pl_module, "decoder", None)
        if isinstance(decoder, torch.nn.Module):
            self._hook = decoder.register_forward_hook(self._look)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._wanted = (trainer.global_step + 1) % trainer.log_every_n_steps == 0

    def _look(self, decoder: torch.nn.Module, inputs: Any, output: Any) -> None:
        if not (self._wanted and decoder.training and isinstance(output, tuple)):
            return
        nll, lse = (x.detach().double() for x in output)
        kept = lse != 0  # exactly zero is where there is no target
        squares = (lse.square().sum(), (lse - nll).square().sum())
        sums = torch.stack([kept.sum(), nll.sum(), lse.sum(), *squares])
        largest = lse.masked_fill(~kept, -torch.inf).max()
        first = self._sums is None
        self._sums = sums if first else self._sums + sums
        self._largest = largest if first else torch.maximum(self._largest, largest)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._sums is None or trainer.fit_loop._should_accumulate():
            return
        sums, self._sums = self._sums, None
        moved, self._step = trainer.global_step > self._step, trainer.global_step
        if not moved:  # the step was dropped or undone
            return
        reduce = trainer.strategy.reduce
        tokens, *totals = reduce(sums, reduce_op="sum").tolist()
        nll, mean, squares, targets = (total / max(tokens, 1) for total in totals)
        z_loss = getattr(pl_module, "z_loss", 0.0) * squares
        metrics = {
            "mean_square": squares,
            "log_partition_mean": mean,
            "log_partition_max": float(reduce(self._largest, reduce_op="max")),
            "target_logit_rms": math.sqrt(targets),
            "share": z_loss / (nll + z_loss) if z_loss else 0.0,
        }
        pl_module.log_dict({f"z_loss/{name}": value for name, value in metrics.items()})
        self._watch(trainer, mean, math.sqrt(targets))

    def _watch(self, trainer: Trainer, mean: float, target_rms: float) -> None:
        # Written so that a value that is no number counts as far.
        if abs(self._usual.deviation(mean)) <= self.threshold and target_rms <= self.limit:
            self._usual.accept(mean)
            self._far = 0
            return
        self._far += 1
        if self._far == self.patience:
            usual = self._usual.usual
            message = (
                f"log-partition {mean:.2f}, usually {usual:.2f} ± {self._usual.sigma:.2f}; "
                f"target logits {target_rms:.2f}, limit {self.limit:g}"
            )
            values = {"log_partition_mean": mean, "usual": usual, "target_logit_rms": target_rms}
            record(trainer, "z_loss_drift", message, **values)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._hook is not None:
            self._hook.remove()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"accepted": list(self._usual.values), "far": self._far}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._usual.reset(state_dict["accepted"])
        self._far = state_dict["far"]
