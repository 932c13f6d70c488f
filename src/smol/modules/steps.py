"""The optimiser steps of a Trainer, as Lightning counts them."""

from typing import Any


def move_step_count(trainer: Any, difference: int) -> None:
    """Change ``trainer.global_step``, and the count that Lightning logs by, by so many steps."""
    epoch_loop = trainer.fit_loop.epoch_loop
    epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed += difference
    epoch_loop._batches_that_stepped += difference


def forget_last_row(trainer: Any) -> None:
    """Lightning logs the values of the last step once more after one that logs none."""
    if trainer._results is not None:
        trainer._results.reset()


def rewind_loggers(trainer: Any) -> None:
    """Take back what loggers that can do so hold of steps after the present one."""
    forget_last_row(trainer)
    for logger in trainer.loggers:
        if hasattr(logger, "rewind"):
            logger.rewind(trainer.global_step)


def place_of(trainer: Any) -> tuple[int, int]:
    """Lineage and step: a rollback comes to the same step again, on another lineage."""
    return getattr(trainer.lightning_module, "lineage", None) or 0, trainer.global_step
