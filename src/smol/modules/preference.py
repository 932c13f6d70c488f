"""Preference optimisation: chosen answers are to become likelier, rejected ones less likely."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from smol.data.batch import IGNORE
from smol.data.packed import PackedBatch
from smol.errors import UserError
from smol.losses import PreferenceLoss, linear_cross_entropy
from smol.model import Decoder
from smol.modules.base import DecoderModule
from smol.modules.reference import (
    ReferenceWeights,
    cache_key,
    cached_log_probs,
    gather_log_probs,
    lent,
)
from smol.modules.vocabulary import check_vocabulary
from smol.parallel.fsdp import local_part
from smol.paths import resolve

STATE = "preference"  # entry of a checkpoint


class PreferenceOptimization(DecoderModule):
    """Trains on pairs of answers, of which one is preferred.

    Both answers of a pair are documents of one row. The loss of a step is the mean over the pairs
    of the whole global batch, however they are spread over ranks and micro-batches.

    Logged as ``train/…`` and ``held_out/…``, means over pairs: ``loss``; ``rewards/chosen`` and
    ``rewards/rejected``, their difference ``rewards/margins`` and how often it is positive,
    ``rewards/accuracies``; ``logps/chosen`` and ``logps/rejected``, in nats per answer;
    ``length/chosen`` and ``length/rejected``, in trained tokens; ``truncated``, the share of pairs
    with an answer that was cut; ``ranking``, how often the chosen answer is the likelier one,
    whatever the reference (Chen et al. 2024, arXiv 2405.19534); and ``displacement``, how far the
    log-probability of chosen answers has moved from the reference's (without one, from its own at
    the first report), in nats per token. ``train/pairs`` is their number.

    Args:
        loss: Which loss, and its settings.
        reference: ``cached`` computes the log-probabilities of the reference once, before the
            first step; ``live`` keeps a second decoder and computes them for each batch. A loss
            without reference needs neither.
        reference_weights: Folder of a checkpoint or decoder; by default the reference is what the
            run begins with.
        reference_cache: Where computed log-probabilities are kept for other runs.
        rpo_alpha: Weight of the negative log-likelihood per token of the chosen answer, added to
            the loss of each pair (RPO, Pang et al. 2024, arXiv 2404.19733).
        displacement_alarm: A warning is given when ``train/displacement`` falls below minus this,
            in nats per token.
        kwargs: See :class:`~smol.modules.base.DecoderModule`.
    """

    def __init__(
        self,
        loss: PreferenceLoss | None = None,
        reference: Literal["cached", "live"] = "cached",
        reference_weights: str | None = None,
        reference_cache: str = "data/cache/reference",
        rpo_alpha: float = 0.0,
        displacement_alarm: float = 0.25,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if rpo_alpha < 0 or displacement_alarm < 0:
            raise UserError(
                f"rpo_alpha is {rpo_alpha}, displacement_alarm is {displacement_alarm}; expected 0 "
                "or more"
            )
        self.loss = loss or PreferenceLoss()
        self.reference = reference
        self.reference_weights = reference_weights
        self.reference_cache = reference_cache
        self.rpo_alpha = rpo_alpha
        self.displacement_alarm = displacement_alarm
        self._weights: ReferenceWeights | None = None
        self._table: Tensor | None = None
        self._live: tuple[Decoder, ...] = ()  # in a tuple, so that it is no submodule
        self._start: dict[str, float] = {}
        self._displaced = False
        self._held_out: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        """Check that tokenizer and model fit."""
        check_vocabulary(self.trainer.datamodule, self.decoder_config.vocab_size)

    # -- the loss --------------------------------------------------------------------------------

    def objective(self, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        log_probs, lengths = self.answer_log_probs(batch)
        reference = self._reference_log_probs(batch)
        loss, rewards = self.loss(log_probs, reference, lengths)
        if self.rpo_alpha:
            loss = loss - self.rpo_alpha * log_probs[:, 0] / lengths[:, 0]
        objective = loss.sum()
        log_probs = log_probs.detach()
        moved = log_probs if reference is None else log_probs - reference
        sums = {
            "tokens": torch.tensor(len(loss), device=loss.device),
            "loss": objective.detach(),
            "rewards/chosen": rewards[:, 0].sum(),
            "rewards/rejected": rewards[:, 1].sum(),
            "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).sum(),
            "ranking": (log_probs[:, 0] > log_probs[:, 1]).sum(),
            "logps/chosen": log_probs[:, 0].sum(),
            "logps/rejected": log_probs[:, 1].sum(),
            "length/chosen": lengths[:, 0].sum(),
            "length/rejected": lengths[:, 1].sum(),
            "displacement": moved[:, 0].sum(),
            "truncated": self._truncated[batch.items[batch.items >= 0]].sum(),
        }
        return objective, sums

    def answer_log_probs(
        self, batch: PackedBatch, decoder: Decoder | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each answer, and how many tokens it has.

        Args:
            batch: Rows of whole pairs, the chosen answer before the rejected one.
            decoder: By default the one that is trained.

        Returns:
            Nats, ``(pairs, 2)`` float32, and numbers of targets, ``(pairs, 2)`` int64, of the pairs
            row by row.
        """
        head = partial(linear_cross_entropy, targets=batch.targets, ignore_index=IGNORE)
        decoder = decoder or self.decoder
        nll, _ = decoder(batch.tokens, batch.positions, batch.documents, head=head)
        log_probs = sum_by_answer(-nll.double(), batch).float()
        return log_probs, sum_by_answer((batch.targets != IGNORE).long(), batch)

    # -- the reference ---------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        self._prepare_reference()

    def _reference_log_probs(self, batch: PackedBatch) -> Tensor | None:
        """``(pairs, 2)`` float32; ``None`` for a loss without reference."""
        if not self.loss.needs_reference:
            return None
        self._prepare_reference()
        if self._table is not None:
            return self._table[batch.items[batch.items >= 0]]
        with torch.no_grad():
            return self.answer_log_probs(batch, self._live[0])[0]

    def _prepare_reference(self) -> None:
        """Before anything is trained; callbacks may ask for a batch's loss before the trainer."""
        if not self.loss.needs_reference or self._table is not None or self._live:
            return
        self._weights = self._settle_weights()
        if self.reference == "live":
            self._live = (self._second_decoder(),)
            return
        data = self.trainer.datamodule
        table = cached_log_probs(
            Path(resolve(self.reference_cache)),
            cache_key(self._weights, self, data.pairs_digest),
            data.used,
            self._compute_table,
            self.trainer.strategy,
        )
        self._table = table.to(self.device)

    def _settle_weights(self) -> ReferenceWeights:
        """Those of the checkpoint, those that were asked for, or those that are trained now."""
        if self.reference_weights is None:
            begun_with = self.initial_weights or self.trainer.ckpt_path
            return self._weights or ReferenceWeights.of(self.decoder, begun_with)
        folder = Path(resolve(self.reference_weights))
        with lent(self.decoder, folder):
            given = ReferenceWeights.of(self.decoder, folder)
        if self._weights is not None and given.digest != self._weights.digest:
            raise UserError(
                f"reference_weights is {folder}, but the run began with another reference, "
                f"{self._weights.folder}; leave it out, or begin another run with --name"
            )
        return given

    def _second_decoder(self) -> Decoder:
        reference = self.build_decoder()
        with self._weights.inside(self.decoder), torch.no_grad():
            pairs = zip(reference.parameters(), self.decoder.parameters(), strict=True)
            for ours, theirs in pairs:
                local_part(ours).copy_(local_part(theirs))
        return reference.requires_grad_(False).eval()

    def _compute_table(self) -> Tensor:
        trainer, training = self.trainer, self.decoder.training

        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in trainer.datamodule.all_pairs():
                batch = trainer.strategy.batch_to_device(batch, self.device)
                log_probs, _ = self.answer_log_probs(batch)
                yield batch.items[batch.items >= 0], log_probs

        add_up = partial(trainer.strategy.reduce, reduce_op="sum")
        try:
            self.decoder.eval()
            with (
                torch.no_grad(),
                trainer.precision_plugin.forward_context(),
                self._weights.inside(self.decoder),
            ):
                return gather_log_probs(parts(), trainer.datamodule.used.to(self.device), add_up)
        finally:
            self.decoder.train(training)

    # -- metrics ---------------------------------------------------------------------------------

    @cached_property
    def _truncated(self) -> Tensor:
        return self.trainer.datamodule.truncated.to(self.device)

    def report(self, sums: dict[str, float]) -> dict[str, float]:
        metrics = self._metrics(sums, "train")
        metrics["train/pairs"] = sums["tokens"]
        displacement = metrics["train/displacement"]
        displaced = displacement < -self.displacement_alarm
        if displaced and not self._displaced:
            rank_zero_warn(
                f"chosen answers have become less likely by {-displacement:.2f} nats per token; a "
                "smaller learning rate, a larger loss.beta or some rpo_alpha keeps them up",
                category=UserWarning,
            )
        self._displaced = displaced
        return metrics

    def _metrics(self, sums: dict[str, float], prefix: str) -> dict[str, float]:
        means = {key: value / sums["tokens"] for key, value in sums.items() if key != "tokens"}
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        per_token = means["displacement"] / means["length/chosen"]
        start = 0.0 if self.loss.needs_reference else self._start.setdefault(prefix, per_token)
        means["displacement"] = per_token - start
        return {f"{prefix}/{key}": value for key, value in means.items()}

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Count a batch of held-out pairs."""
        _, sums = self.objective(batch)
        for key, value in sums.items():
            self._held_out[key] = self._held_out.get(key, 0) + value.double()

    def on_validation_epoch_end(self) -> None:
        self._log_held_out("held_out")

    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        self._log_held_out("test")

    def _log_held_out(self, prefix: str) -> None:
        values = torch.stack(list(self._held_out.values()))
        values = self.trainer.strategy.reduce(values, reduce_op="sum").tolist()
        sums = dict(zip(self._held_out, values, strict=True))
        self._held_out = {}
        # Equal on all ranks already; Lightning warns of what it is not told to average.
        self.log_dict(self._metrics(sums, prefix) | self.step_metric(), sync_dist=True)

    # -- checkpoints -----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        reference = None if self._weights is None else asdict(self._weights)
        checkpoint[STATE] = {"reference": reference, "start": self._start}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get(STATE)
        if state is None:  # of another phase, which this run continues
            return
        self._start = dict(state["start"])
        if state["reference"] is not None:
            self._weights = ReferenceWeights(**state["reference"])
        elif self.loss.needs_reference and self.reference_weights is None:
            raise UserError(
                f"the checkpoint was trained without a reference, but '{self.loss.name}' needs one;"
                " give --model.reference_weights FOLDER, or begin another run with --name"
            )


def sum_by_answer(values: Tensor, batch: PackedBatch) -> Tensor:
    """Add up numbers of tokens over the answers they belong to.

    Args:
        values: ``(rows, time)``, zero on padding.
        batch: Says which is which: document ``k`` of a row is answer ``k % 2`` of its pair
            ``k // 2``.

    Returns:
        ``(pairs, 2)``, of the dtype of ``values``, row by row.
    """
    rows, most = batch.items.shape
    # One document more, since a row may end with padding.
    sums = values.new_zeros(rows, 2 * most + 1).scatter_add(1, batch.documents.long(), values)
    return sums[:, :-1].reshape(rows, most, 2)[batch.items >= 0]
