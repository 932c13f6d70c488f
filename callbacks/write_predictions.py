"""Keeps what ``predict`` computes."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.parts.collectives import reads_first
from smol.data.batch import IGNORE


class WritePredictions(Callback):
    """Writes a line of JSON for each held-out row: source, loss, text, and the loss of each token.

    Needs this project's data and language modelling. The file is ``predictions.jsonl`` in the run
    folder (``predictions-1.jsonl``, … of other ranks that have rows of their own).

    .. code-block:: yaml

        callbacks:
          predictions:
            class_path: callbacks.WritePredictions
    """

    order = 300

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rank = "" if trainer.is_global_zero else f"-{trainer.global_rank}"
        self.path = Path(trainer.default_root_dir, f"predictions{rank}.jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = None
        if reads_first(trainer):
            self._file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Any],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._file is None:
            return
        data = trainer.datamodule
        columns = (outputs[key].tolist() for key in ("sources", "tokens", "log_likelihood"))
        for source, tokens, scores in zip(*columns, strict=True):
            kept = [(t, -s) for t, s in zip(tokens, scores, strict=True) if t != IGNORE]
            if not kept:
                continue
            losses = [loss for _, loss in kept]
            row = {
                "source": data.source_names[source],
                "loss": sum(losses) / len(losses),
                "text": data.tokenizer.decode([token for token, _ in kept]),
                "token_losses": [round(loss, 4) for loss in losses],
            }
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._file is not None:
            self._file.close()
        if trainer.is_global_zero:
            print(f"wrote {self.path}")
