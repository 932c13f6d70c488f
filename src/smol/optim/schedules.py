"""Learning-rate schedules: pure functions of the optimiser step that carry no state.

A schedule maps the 0-based number of the optimiser step about to be taken to a multiplier of the
peak learning rate in [0, 1]. Nothing is stored in a checkpoint, so a resumed run follows the
schedule of its current configuration from the very next step.

All schedules warm up alike: step ``s < warmup_steps`` uses ``(s + 1) / warmup_steps``, so that step
0 already learns something and step ``warmup_steps - 1`` is the first at the peak. A decay that
starts at step ``d`` and lasts ``n`` steps uses the progress ``(s - d) / n``: step ``d`` is the last
at the peak, step ``d + n - 1`` is the last of the decay and still above the final value, and every
step from ``d + n`` on uses the final value.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

from smol.errors import UserError


class Schedule(ABC):
    """A multiplier of the peak learning rate per optimiser step."""

    def __init__(self, warmup_steps: int = 0) -> None:
        if warmup_steps < 0:
            raise UserError(f"warmup_steps is {warmup_steps}; expected 0 or more")
        self.warmup_steps = warmup_steps

    def __call__(self, step: int) -> float:
        """Return the multiplier for one optimiser step.

        Args:
            step: Number of optimiser steps taken before this one (0 for the first).

        Returns:
            A multiplier of the peak learning rate, in [0, 1].
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup(step)

    @abstractmethod
    def after_warmup(self, step: int) -> float:
        """Return the multiplier for a ``step`` of at least ``warmup_steps``."""


class Constant(Schedule):
    """Linear warm-up, then the peak for ever.

    Args:
        warmup_steps: Optimiser steps of the linear warm-up.
    """

    def after_warmup(self, step: int) -> float:
        return 1.0


class WSD(Schedule):
    """Warm-up, stable, decay (Hu et al., MiniCPM, arXiv 2404.06395).

    The decay is placed by its end (``total_steps``) or by its start (``decay_start_step``). Without
    ``decay_steps`` the stable phase never ends: an early stage says nothing about the decay and a
    later one adds it.

    Args:
        warmup_steps: Optimiser steps of the linear warm-up.
        decay_steps: Optimiser steps of the decay; 0 for none.
        total_steps: The step at which the decay has ended.
        decay_start_step: The step at which the decay starts; the alternative to ``total_steps``.
        shape: ``linear``, or ``sqrt`` for ``1 - sqrt(progress)`` (Hägele et al.,
            arXiv 2405.18392, where it beats linear).
        final: The multiplier after the decay, in [0, 1].

    Raises:
        UserError: If the decay is not placed exactly once or would start before the warm-up ends.
    """

    def __init__(
        self,
        warmup_steps: int,
        decay_steps: int = 0,
        total_steps: int | None = None,
        decay_start_step: int | None = None,
        shape: Literal["linear", "sqrt"] = "linear",
        final: float = 0.0,
    ) -> None:
        super().__init__(warmup_steps)
        _check_final(final)
        if decay_steps < 0:
            raise UserError(f"decay_steps is {decay_steps}; expected 0 or more")
        if decay_steps and (total_steps is None) == (decay_start_step is None):
            raise UserError(
                f"WSD with decay_steps={decay_steps} got total_steps={total_steps} and "
                f"decay_start_step={decay_start_step}; give exactly one of the two"
            )
        if not decay_steps and decay_start_step is not None:
            raise UserError(
                f"WSD got decay_start_step={decay_start_step} but no decay_steps; "
                "set decay_steps to the length of the decay"
            )
        if shape not in ("linear", "sqrt"):
            raise UserError(f"WSD shape is {shape!r}; expected 'linear' or 'sqrt'")
        if decay_steps and total_steps is not None:
            decay_start_step = total_steps - decay_steps
        if decay_steps and decay_start_step < warmup_steps:
            raise UserError(
                f"WSD would start its decay at step {decay_start_step}, before its warm-up of "
                f"{warmup_steps} steps ends; shorten warmup_steps or decay_steps"
            )
        self.decay_start_step = decay_start_step
        self.decay_steps = decay_steps
        self.shape = shape
        self.final = final

    def after_warmup(self, step: int) -> float:
        if not self.decay_steps or step <= self.decay_start_step:
            return 1.0
        progress = min((step - self.decay_start_step) / self.decay_steps, 1.0)
        remaining = 1.0 - (math.sqrt(progress) if self.shape == "sqrt" else progress)
        return self.final + (1.0 - self.final) * remaining


class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to ``final`` (Loshchilov & Hutter, arXiv 1608.03983).

    Args:
        warmup_steps: Optimiser steps of the linear warm-up.
        total_steps: The step at which the decay has ended.
        final: The multiplier after the decay, in [0, 1].

    Raises:
        UserError: If ``total_steps`` does not lie after the warm-up.
    """

    def __init__(self, warmup_steps: int, total_steps: int, final: float = 0.1) -> None:
        super().__init__(warmup_steps)
        _check_final(final)
        if total_steps <= warmup_steps:
            raise UserError(
                f"Cosine got total_steps={total_steps} and warmup_steps={warmup_steps}; "
                "total_steps must be larger"
            )
        self.total_steps = total_steps
        self.final = final

    def after_warmup(self, step: int) -> float:
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        remaining = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
        return self.final + (1.0 - self.final) * remaining


def _check_final(final: float) -> None:
    if not 0.0 <= final <= 1.0:
        raise UserError(f"final is {final}; expected a multiplier between 0 and 1")
