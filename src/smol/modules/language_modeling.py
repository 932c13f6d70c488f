"""Next-token prediction."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from smol.data.batch import IGNORE, TokenBatch
from smol.evaluation.bits_per_byte import BitsPerByte
from smol.losses import linear_cross_entropy
from smol.modules.base import DecoderModule
from smol.modules.vocabulary import check_vocabulary


class LanguageModeling(DecoderModule):
    """Pretraining: the negative log-likelihood of each token given those before it in its document.

    Args:
        z_loss: Coefficient of the z-loss, the mean squared log-partition (PaLM, Chowdhery et al.
            2022); 0 leaves it out of the objective, but it is still logged.
        kwargs: See :class:`~smol.modules.base.DecoderModule`.
    """

    def __init__(self, z_loss: float = 0.0, **kwargs: Any):
        super().__init__(**kwargs)
        self.z_loss = z_loss
        self.bits_per_byte: BitsPerByte | None = None

    def objective(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        nll, lse = self._likelihood(batch)
        valid = batch.targets != IGNORE
        nats, squares = nll.sum(), (lse.square() * valid).sum()
        objective = nats + self.z_loss * squares if self.z_loss else nats
        sums = {"loss": nats, "z_loss": squares, "tokens": valid.sum()}
        return objective, {key: value.detach() for key, value in sums.items()}

    def _likelihood(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        # Where nothing is masked, a GPU need not be asked what is.
        ignored = None if batch.exact else IGNORE
        head = partial(linear_cross_entropy, targets=batch.targets, ignore_index=ignored)
        return self.decoder(batch.tokens, batch.positions, batch.documents, head=head)

    def setup(self, stage: str) -> None:
        """Check that tokenizer and model fit, and make the metric that knows its sources."""
        data = self.trainer.datamodule
        if getattr(data, "tokenizer", None) is None:
            return
        check_vocabulary(data, self.decoder_config.vocab_size)
        self.bits_per_byte = BitsPerByte(data.source_names, data.tokenizer)

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> dict[str, Tensor]:
        """Count a batch of held-out text.

        Returns:
            ``nll`` for callbacks, the negative log-likelihood of each target in nats,
            ``(rows, time)`` float32, zero where there is none.
        """
        nll, _ = self._likelihood(batch)
        self.bits_per_byte.update(nll, batch.targets, batch.sources)
        return {"nll": nll}

    def on_validation_epoch_end(self) -> None:
        self._log_bits_per_byte("held_out")

    def _log_bits_per_byte(self, prefix: str) -> None:
        metrics = {f"{prefix}/{name}": v for name, v in self.bits_per_byte.compute().items()}
        self.bits_per_byte.reset()
        # Equal on all ranks already; Lightning warns of what it is not told to average.
        self.log_dict(metrics | self.step_metric(), sync_dist=True)

    test_step = validation_step  # on all held-out text

    def on_test_epoch_end(self) -> None:
        self._log_bits_per_byte("test")

    def predict_step(self, batch: TokenBatch, batch_idx: int) -> dict[str, Tensor]:
        """Log-likelihood of every held-out token.

        Returns:
            ``tokens`` ``(rows, time)`` int64, the predicted ones; ``log_likelihood``
            ``(rows, time)`` float32; ``sources`` ``(rows,)``.
        """
        with torch.no_grad():
            nll, _ = self._likelihood(batch)
        return {"tokens": batch.targets, "log_likelihood": -nll, "sources": batch.sources}
