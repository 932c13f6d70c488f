"""What all training objectives share: decoder, optimiser, schedule, normalisation, logging."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from smol.checkpoints.weights import copy_weights
from smol.data.batch import TokenBatch
from smol.errors import UserError
from smol.model import Decoder, DecoderConfig, RopeConfig, check_initialization, init_weights
from smol.model.activation_checkpointing import ActivationCheckpointing
from smol.model.float8 import Float8, check_tokens, convert_to_float8
from smol.model.io import DESCRIPTION
from smol.modules.host_memory import keep_freed_memory
from smol.modules.steps import move_step_count, rewind_loggers
from smol.optim import (
    Constant,
    OptimizerConfig,
    Schedule,
    build_optimizer,
    clip_gradients,
    gradient_norm,
    set_learning_rates,
)
from smol.parallel import FSDP2Strategy


class DecoderModule(LightningModule):
    """A decoder under training. Subclasses say what the loss of a batch is.

    The learning rate, like every other hyper-parameter of the optimiser, is a function of the
    current configuration and of the step; a checkpoint restores moments and step counts only.

    Args:
        decoder: Shape and features of the model.
        rope: Rotary position embedding.
        attention: Attention backend: sdpa, flex, varlen or xformers.
        optimizer: Optimiser and parameter groups.
        schedule: Learning-rate schedule over optimiser steps.
        compile: Compile each block with ``torch.compile``.
        activation_checkpointing: What blocks compute again in the backward pass, to save memory:
            none, selective (all but matrix products and attention) or full (all).
        float8: Products of the blocks in float8 (torchao), best with ``compile``: none, tensorwise,
            rowwise or rowwise_with_gw_hp. It needs an Ada or Hopper GPU or a newer one.
        init_seed: Seed of the initial weights.
    """

    def __init__(
        self,
        decoder: DecoderConfig,
        rope: RopeConfig | None = None,
        attention: str = "sdpa",
        optimizer: OptimizerConfig | None = None,
        schedule: Schedule | None = None,
        compile: bool = False,
        activation_checkpointing: ActivationCheckpointing = "none",
        float8: Float8 = "none",
        init_seed: int = 6,
    ):
        super().__init__()
        self.decoder_config = decoder
        self.rope_config = rope or RopeConfig()
        self.attention = attention
        self.optimizer_config = optimizer or OptimizerConfig()
        self.schedule = schedule or Constant()
        self.compile_blocks = compile
        self.activation_checkpointing = activation_checkpointing
        self.float8 = float8
        self.init_seed = init_seed
        self.learning_rate_scale = 1.0  # a factor for whoever has to slow the training down
        self.initial_weights: Path | None = None
        self.lineage: int | None = None
        self.config_digest = ""
        self.decoder: Decoder | None = None
        self._batch: TokenBatch | None = None
        self._sums: dict[str, Tensor] = {}
        self._grad_norm: Tensor | None = None
        self._next_position = 0
        self._stepped = False
        self._dropped = False

    def objective(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch, summed over its trained tokens.

        Returns:
            The sum to differentiate (a scalar), and detached sums to report, among them ``tokens``,
            the number of trained tokens. All are added up over micro-batches and ranks.
        """
        raise NotImplementedError

    def report(self, sums: dict[str, float]) -> dict[str, float]:
        """Metrics of an optimiser step from its sums over all micro-batches and ranks."""
        return {f"train/{k}": v / sums["tokens"] for k, v in sums.items() if k != "tokens"}

    # -- model and optimiser ---------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the decoder and give it its first weights."""
        if self.decoder is not None:
            return
        decoder = self.build_decoder()
        if self.initial_weights is None:
            check_initialization(decoder)
        else:
            copy_weights(decoder, self.initial_weights)
        self.decoder = decoder

    def build_decoder(self) -> Decoder:
        """A decoder with random weights, sharded when the strategy says so."""
        strategy = self.trainer.strategy
        device = strategy.root_device
        if device.type == "cpu":
            # Trained weights make many numbers of 1e-38 and less, which slow a processor down (see
            # docs/log.md). Threads inherit this, so it comes before the first product.
            torch.set_flush_denormal(True)
            keep_freed_memory()
        with torch.device("meta"):
            decoder = Decoder(
                self.decoder_config, self.rope_config, self.attention, self.activation_checkpointing
            )
        parts = getattr(strategy, "_tensor_parallel_size", 1)
        converted, layers = convert_to_float8(decoder, self.float8, device, parts=parts)
        if converted:
            rank_zero_info(f"float8 {self.float8}: {converted} of {layers} linear layers of blocks")
        if self.compile_blocks:
            for layer in decoder.model.layers:
                layer.compile()
        if isinstance(strategy, FSDP2Strategy):
            # Of which all contexts are multiples.
            strategy.shard(decoder, getattr(self.trainer.datamodule, "shortest_context", None))
            device = strategy.parameter_device
        decoder.to_empty(device=device)
        init_weights(decoder, seed=self.init_seed)
        return decoder

    def teardown(self, stage: str) -> None:
        torch.set_flush_denormal(False)  # other code of this process may mean what it says

    def configure_optimizers(self) -> Optimizer:
        return build_optimizer(self.decoder.named_parameters(), self.optimizer_config)

    # -- one optimiser step ----------------------------------------------------------------------

    def on_train_start(self) -> None:
        accumulation = getattr(self.trainer.datamodule, "accumulation", None)
        if accumulation is not None:
            self.trainer.accumulate_grad_batches = accumulation
        self.trainer.val_check_batch = float("inf")
        rewind_loggers(self.trainer)

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Forward one micro-batch.

        The loss of the global batch is its sum over trained tokens divided by their number,
        wherever they lie. That number, or an upper bound of it, is a constant known in advance.
        """
        if self.decoder_config.dropout:
            # A function of the position, as the data is, so that a restart goes on exactly.
            place = (self.init_seed, batch.position, batch.micro, self.trainer.global_rank)
            torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        if self.float8 != "none":
            check_tokens(batch.tokens.numel())
        objective, sums = self.objective(batch)
        if batch.micro == 0:
            self._sums = sums
        else:
            self._sums = {key: self._sums[key] + value for key, value in sums.items()}
        self._batch, self._next_position = batch, batch.next_position
        self._grad_norm, self._dropped = None, False
        # Lightning divides by the accumulation, and gradients are averaged over the ranks.
        return objective * (self._ranks * batch.accumulation / batch.step_tokens)

    def on_after_backward(self) -> None:
        """Once the whole window is in, replace an estimated number of tokens by the true one."""
        batch = self._batch
        if batch.exact or batch.micro < batch.accumulation - 1:
            return
        tokens = float(self.trainer.strategy.reduce(self._sums["tokens"].clone(), reduce_op="sum"))
        if tokens == 0:
            self.drop_step()
            return
        for parameter in self.decoder.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(batch.step_tokens / tokens)

    @property
    def step_is_dropped(self) -> bool:
        """Whether the optimiser step whose gradients were computed last is not taken."""
        return self._dropped

    def drop_step(self) -> None:
        """Do not take the optimiser step whose gradients are there; to be called on all ranks.

        Its data counts as read, but it is neither a step nor a tick of the schedule.
        """
        self._dropped = True
        for parameter in self.decoder.parameters():
            parameter.grad = None  # the optimiser passes over it: no moment, no decay, no tick

    def gradient_norm(self) -> Tensor:
        """Norm of the step's gradients before clipping, a scalar; all ranks have to ask for it.

        Whoever changes gradients does so before anybody asks: it is computed once for each step.
        """
        if self._grad_norm is None:
            norm = gradient_norm(self.decoder.parameters()).to(self.device)
            strategy = self.trainer.strategy
            if isinstance(strategy, FSDPStrategy):  # what a process sees of its flat parameters
                norm = strategy.reduce(norm.square(), reduce_op="sum").sqrt()
            self._grad_norm = norm
        return self._grad_norm

    @property
    def _ranks(self) -> int:
        kwargs = self.trainer.distributed_sampler_kwargs
        return kwargs["num_replicas"] if kwargs else 1

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Optimizer, optimizer_closure: Any = None
    ) -> None:
        """Set the hyper-parameters of this step, then take it."""
        factor = self.schedule(self.trainer.global_step) * self.learning_rate_scale
        set_learning_rates(optimizer, self.optimizer_config, factor)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._stepped = True
        data = self.trainer.datamodule
        if hasattr(data, "consume"):
            data.consume(self._next_position)
        if self._dropped:
            move_step_count(self.trainer, -1)
            if hasattr(data, "skip"):
                data.skip(self._batch.position, self._next_position)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the global norm, parameters being whole or sharded."""
        clip_gradients(self.decoder.parameters(), gradient_clip_val, self.gradient_norm())

    def on_train_batch_end(self, outputs: Any, batch: TokenBatch, batch_idx: int) -> None:
        trainer = self.trainer
        self._validate_if_due(stepped=self._stepped and not self._dropped)
        if not self._stepped:
            return
        self._stepped = False
        accumulation = getattr(trainer.datamodule, "accumulation", batch.accumulation)
        if accumulation != batch.accumulation:
            _change_accumulation(trainer, accumulation)
        if trainer.global_step % trainer.log_every_n_steps == 0 and not self._dropped:
            self._log(batch)

    def _validate_if_due(self, stepped: bool) -> None:
        """``trainer.val_check_interval`` counts optimiser steps, and the last step validates.

        Lightning counts micro-batches since the start of the process, which neither survives a
        restart nor a change of accumulation.
        """
        trainer, interval = self.trainer, self.trainer.val_check_interval
        step = trainer.global_step
        due = step == trainer.max_steps or (isinstance(interval, int) and step % interval == 0)
        trainer.val_check_batch = 1 if stepped and due else float("inf")

    # -- logging ---------------------------------------------------------------------------------

    def _log(self, batch: TokenBatch) -> None:
        keys = sorted(self._sums)
        values = torch.stack([self._sums[key].detach().double() for key in keys])
        values = self.trainer.strategy.reduce(values, reduce_op="sum")
        metrics = self.report(dict(zip(keys, values.tolist(), strict=True)))
        metrics["train/grad_norm"] = float(self._grad_norm)
        metrics["train/learning_rate"] = max(g["lr"] for g in self.optimizers().param_groups)
        self.log_dict(metrics | self.step_metric())

    def step_metric(self) -> dict[str, float]:
        """The x-axes of what is logged in training: completed optimiser steps, and tokens.

        Lightning would count the steps before this one, and validation differently.
        """
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        if not fitting:
            return {}
        return {"step": float(self.trainer.global_step), "train/tokens": float(self._next_position)}

    # -- checkpoints -----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Lightning's loop counters depend on accumulation and would shift every later boundary;
        # the step and the position of the data say all there is to say.
        checkpoint.pop("loops", None)
        checkpoint.pop("lr_schedulers", None)
        checkpoint["files"] = {
            DESCRIPTION: {
                "decoder": asdict(self.decoder_config),
                "rope": asdict(self._trained_rope()),
            }
        }
        checkpoint["manifest"] = {
            "tokens": self._next_position,
            "lineage": self.lineage or 0,
            "parent": Path(self.trainer.ckpt_path).name if self.trainer.ckpt_path else None,
            "config_digest": self.config_digest,
            "run_name": Path(self.trainer.default_root_dir).name,
        }

    def _trained_rope(self) -> RopeConfig:
        """The rotary embedding, and the context it was trained at for YaRN to stretch."""
        rope = self.decoder.rope
        context = getattr(self.trainer.datamodule, "trained_context", None)
        if rope.yarn_factor is None and context is not None:
            rope = replace(rope, original_context=context)
        return rope

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_shapes(checkpoint["state_dict"], self.state_dict())
        checkpoint.setdefault("lr_schedulers", [])
        manifest = checkpoint.get("manifest", {})
        self._next_position = manifest.get("tokens", 0)
        if self.lineage is None:
            self.lineage = manifest.get("lineage", 0)
        move_step_count(self.trainer, checkpoint["global_step"] - self.trainer.global_step)


def check_shapes(saved: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
    """Compare the weights of a checkpoint with those of the model that is to go on from it.

    Raises:
        UserError: one is missing, left over, or of another shape.
    """
    for name in sorted(saved.keys() | current.keys()):
        shapes = [tuple(s[name].shape) if name in s else None for s in (saved, current)]
        if shapes[0] != shapes[1]:
            there, here = (shape or "nothing" for shape in shapes)
            raise UserError(
                f"the checkpoint has {there} at '{name}', the configuration {here}; restore "
                "model.decoder, or begin another run with --name or --ckpt_path scratch"
            )


def _change_accumulation(trainer: Any, accumulation: int) -> None:
    """Begin the next optimiser step at a multiple of its accumulation, by Lightning's count."""
    trainer.accumulate_grad_batches = accumulation
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    progress.ready = -(-progress.ready // accumulation) * accumulation
