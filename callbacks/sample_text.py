"""Lets the model write."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from smol.errors import UserError
from smol.generation import generate


class SampleText(Callback):
    """Writes a paragraph into ``samples.txt``: when training ends and, if asked, on the way.

    Training goes on bit-identically with and without. Needs a module with a ``decoder`` and data
    with a ``tokenizer`` and a ``context_length``; with any others nothing is written.

    .. code-block:: yaml

        callbacks:
          sample_text:
            class_path: callbacks.SampleText
            init_args: {prompt: "The ", tokens: 120, every: 1000}

    Args:
        prompt: How the paragraph begins; may be empty.
        tokens: Its length at most.
        temperature: Of the sampling.
        top_p: Of the sampling.
        every: Optimiser steps between paragraphs; 0 writes only at the end.

    Attributes:
        text: The newest paragraph; ``None`` before the first.
    """

    order = 500

    def __init__(
        self,
        prompt: str = "",
        tokens: int = 120,
        temperature: float = 0.7,
        top_p: float = 0.95,
        every: int = 0,
    ):
        if every < 0:
            raise UserError(f"SampleText every is {every}, expected 0 or more optimiser steps")
        self.prompt, self.tokens, self.every = prompt, tokens, every
        self.temperature, self.top_p = temperature, top_p
        self.text: str | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        moved = step > self._step
        self._step = min(step, self._step)  # a rollback writes again on the other way
        if self.every and moved and step % self.every == 0:
            self._write(trainer, pl_module)
            self._step = step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.text is None or trainer.global_step != self._step:
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule
        decoder, tokenizer = getattr(pl_module, "decoder", None), getattr(data, "tokenizer", None)
        context = getattr(data, "context_length", None)
        if decoder is None or tokenizer is None or context is None:
            return
        modes = [(module, module.training) for module in pl_module.modules()]
        pl_module.eval()
        with (
            trainer.profiler.profile("sample_text"),
            trainer.precision_plugin.forward_context(),
            # A growing text has a new length at each token: nothing to compile for.
            torch.compiler.set_stance("force_eager"),
        ):
            new = generate(
                decoder,
                # A text begins after the end of the one before it.
                [tokenizer.eos_id, *tokenizer.encode(self.prompt)],
                self.tokens,
                context,
                self.temperature,
                self.top_p,
                stop=[tokenizer.eos_id],
                seed=0,  # the same on all ranks, which write together
            )
        for module, training in modes:
            module.training = training
        self.text = self.prompt + tokenizer.decode(new)
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir, "samples.txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"--- step {trainer.global_step}\n{self.text}\n")
