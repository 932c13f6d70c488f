"""What a run has read of each source."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.events import record
from smol.errors import UserError

TOKENS, EPOCHS = "data/tokens/", "data/epochs/"


class SourceLedger(Callback):
    """Logs tokens and epochs of each source; an event when one is repeated too often.

    Logged are ``data/tokens/<source>`` and ``data/epochs/<source>`` since the beginning of the
    data, dropped steps, earlier stages and restarts included. An event ``repetition`` tells once
    per source, at the next logged step, that it has been read more than ``max_epochs`` times;
    repeated data are as good as new ones up to about four times
    (https://arxiv.org/abs/2305.16264). At the end ``sources.json`` in the run folder has
    ``tokens``, ``epochs``, ``share`` of all tokens and the ``planned_share`` that the weights of
    the stages stand for.

    The data needs a method ``ledger`` that returns the metrics by name, as
    :class:`smol.data.Pretraining` does; with any other there is nothing to log.

    .. code-block:: yaml

        callbacks:
          source_ledger:
            class_path: callbacks.SourceLedger
            init_args: {max_epochs: 4}

    Args:
        max_epochs: How often a source may be read.
    """

    order = 200

    def __init__(self, max_epochs: float = 4.0):
        if max_epochs <= 0:
            raise UserError(f"SourceLedger max_epochs is {max_epochs:g}, expected more than 0")
        self.max_epochs = max_epochs
        self._told: set[str] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ledger = getattr(trainer.datamodule, "ledger", None)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        moved, self._step = step > self._step, step  # not after a dropped or undone step
        if self._ledger is None or not moved or step % trainer.log_every_n_steps:
            return
        metrics = self._ledger()
        pl_module.log_dict(metrics)
        self._watch(trainer, metrics)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._ledger is None:
            return
        metrics = self._ledger()
        self._watch(trainer, metrics)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            table = json.dumps(_table(metrics, planned_shares(trainer.datamodule)), indent=1)
            (folder / "sources.json").write_text(table + "\n")

    def _watch(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        for source, epochs in _named(metrics, EPOCHS).items():
            if epochs > self.max_epochs and source not in self._told:
                self._told.add(source)
                message = f"'{source}' has been read {epochs:.2f} times, limit {self.max_epochs:g}"
                record(trainer, "repetition", message, source=source, epochs=epochs)

    def state_dict(self) -> dict[str, Any]:
        return {"told": sorted(self._told)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._told = set(state_dict["told"])


def planned_shares(data: Any) -> dict[str, float]:
    """Shares of the tokens read so far as the stages' weights say; empty where none are known.

    Args:
        data: A data module; what matters is its ``loader``'s ``curriculum`` and ``position``.
    """
    loader = getattr(data, "loader", None)
    curriculum = getattr(loader, "curriculum", None)
    segments = () if curriculum is None else curriculum.history(loader.position)
    shares: dict[str, float] = {}
    for segment in segments:
        part = (segment.stop - segment.start) / loader.position
        for name, weight in segment.weights.items():
            shares[name] = shares.get(name, 0.0) + part * weight / sum(segment.weights.values())
    return shares


def _named(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    return {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}


def _table(metrics: dict[str, float], planned: dict[str, float]) -> dict[str, dict[str, Any]]:
    tokens, epochs = _named(metrics, TOKENS), _named(metrics, EPOCHS)
    total = sum(tokens.values())
    return {
        source: {
            "tokens": int(count),
            "epochs": epochs.get(source),  # none of a source that is gone
            "share": count / total if total else 0.0,
            "planned_share": planned.get(source),
        }
        for source, count in tokens.items()
    }
