"""Grows the context while training."""

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from smol.errors import UserError


class ContextLengthSchedule(Callback):
    """Changes the context length in the course of a run, and the base of rotary embedding with it.

    The tokens of a global batch stay what they are: a longer context means fewer rows. The lengths
    are part of the plan of the data before the first batch (as if the stages had said so), so a
    restart reads exactly what an uninterrupted run would; while training, the callback only sets
    the base that belongs to the batch that comes. Lengths are the shortest one times powers of two.

    Needs data with ``schedule_contexts``, such as ``smol.data.Pretraining``, and for ``thetas`` a
    decoder with ``set_rope_theta``.

    .. code-block:: yaml

        callbacks:
          context_length:
            class_path: callbacks.ContextLengthSchedule
            init_args:
              contexts: {0: 128, 200: 256}
              thetas: {128: 10000.0, 256: 50000.0}

    Args:
        contexts: Tokens per sequence, from each optimiser step (or token) on; begins with 0.
        unit: What the keys of ``contexts`` count: ``steps`` or ``tokens``.
        thetas: Base of rotary embedding for each context length; by default it stays.
    """

    order = 100

    def __init__(
        self,
        contexts: dict[int, int],
        unit: Literal["steps", "tokens"] = "steps",
        thetas: dict[int, float] | None = None,
    ):
        missing = sorted(set(contexts.values()) - set(thetas)) if thetas else []
        if missing:
            raise UserError(f"thetas has no entry for context {missing[0]}; expected one for each")
        self.contexts, self.unit, self.thetas = contexts, unit, thetas
        self._theta: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule
        if not hasattr(data, "schedule_contexts"):
            raise UserError(
                f"ContextLengthSchedule needs data with schedule_contexts, such as "
                f"smol.data.Pretraining; this is {type(data).__name__}"
            )
        data.schedule_contexts(self.contexts, self.unit)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = trainer.datamodule.loader
        self._apply(pl_module, loader.curriculum.segment(loader.position).context)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._apply(pl_module, batch.tokens.shape[1])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._set(pl_module)

    on_test_start = on_predict_start = on_validation_start

    def _apply(self, pl_module: LightningModule, context: int) -> None:
        if self.thetas:
            self._theta = self.thetas[context]
            self._set(pl_module)

    def _set(self, pl_module: LightningModule) -> None:
        if self._theta is not None:
            pl_module.decoder.set_rope_theta(self._theta)

    def state_dict(self) -> dict[str, Any]:
        # For validation of a checkpoint, which sees no batch of training.
        return {"theta": self._theta}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._theta = state_dict["theta"]
