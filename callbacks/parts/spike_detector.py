"""Whether an optimiser step is like those before it."""

import math
from typing import Any

from callbacks.parts.robust_window import RobustWindow
from smol.errors import UserError


class SpikeDetector:
    """Judges steps by their loss and gradient norm, and remembers those that were accepted.

    Args:
        threshold: Robust z-score above which a step is a spike; ``None``: none is.
        window: Accepted steps that a step is compared with.
        warmup: Accepted steps, from the start and after every change of regime, before anything is
            a spike.
    """

    def __init__(self, threshold: float | None, window: int, warmup: int):
        if not 1 <= warmup <= window:
            raise UserError(
                f"NaNRollback warmup {warmup}, window {window}; expected 1 or more, and a window "
                "of at least warmup, or nothing would ever be a spike"
            )
        self.threshold = threshold
        self.loss = RobustWindow(window, warmup, relative=0.02, absolute=1e-3)
        # Healthy runs know single steps of some hundred times the usual norm, and clipping is there
        # for them; with this, ten standard deviations are a factor of 22,000.
        self.log_norm = RobustWindow(window, warmup, relative=0.0, absolute=1.0)
        self._regime: Any = None

    def begin(self, regime: Any) -> None:
        """A step begins; in another regime there is another loss."""
        if regime != self._regime:
            self.reset()
            self._regime = regime

    def reset(self) -> None:
        """Forget what was usual."""
        self._regime = None
        self.loss.reset()
        self.log_norm.reset()

    def judge(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step; nothing, and it is one of those that are compared with."""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"{name} {value}"
        log_norm = math.log(max(norm, 1e-30))
        for name, value, usual in (
            ("loss", loss, self.loss),
            ("logarithm of the gradient norm", log_norm, self.log_norm),
        ):
            if self.threshold is not None and usual.deviation(value) > self.threshold:
                return f"{name} {value:.3f}, usually {usual.usual:.3f} ± {usual.sigma:.3f}"
        self.loss.accept(loss)
        self.log_norm.accept(log_norm)
        return None

    def state_dict(self) -> dict[str, Any]:
        return {
            "regime": self._regime,
            "losses": list(self.loss.values),
            "log_norms": list(self.log_norm.values),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._regime = state_dict["regime"]
        self.loss.reset(state_dict["losses"])
        self.log_norm.reset(state_dict["log_norms"])


def regime_of(trainer: Any, batch: Any) -> list | None:
    """What must be the same for losses to be compared: stage, context and mixture, if any."""
    curriculum = getattr(getattr(trainer.datamodule, "loader", None), "curriculum", None)
    if curriculum is None or not hasattr(batch, "position"):
        return None
    segment = curriculum.segment(batch.position)
    return [segment.stage, segment.context, segment.weights, segment.digests]
