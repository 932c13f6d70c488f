"""Lets the model write."""

import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from smol.errors import UserError
from smol.generation import Generator, Sampling


class SampleText(Callback):
    """Writes a paragraph into ``samples.txt``: when training ends and, if asked, on the way.

    A run that went back, by a restart or a rollback, replaces what it wrote of later steps.
    Training goes on bit-identically with and without. Needs a module with a ``decoder`` and data
    with a ``tokenizer`` and a ``context_length``; with any others nothing is written.

    .. code-block:: yaml

        callbacks:
          sample_text:
            class_path: callbacks.SampleText
            init_args: {prompt: "The ", tokens: 120, every: 1000}

    Args:
        prompt: How the paragraph begins; may be empty.
        tokens: Its length at most; prompt and paragraph together fill one context.
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
        self.prompt, self.every = prompt, every
        # Seeded, so that all ranks, which write together, write the same.
        self.sampling = Sampling(temperature, top_p=top_p, max_new_tokens=tokens, seed=0)
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
        # A text begins after the end of the one before it.
        prompt = [tokenizer.eos_id, *tokenizer.encode(self.prompt)][: context - 1]
        with (
            trainer.profiler.profile("sample_text"),
            trainer.precision_plugin.forward_context(),
        ):
            generator = Generator(decoder, tokenizer, max_length=context)
            [completion] = generator.generate([prompt], self.sampling)
        self.text = self.prompt + completion.text
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir, "samples.txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            before = _before(path, trainer.global_step)
            text = f"{before}--- step {trainer.global_step}\n{self.text}\n"
            path.write_text(text, encoding="utf-8")


def _before(path: Path, step: int) -> str:
    """What a file holds of the steps before ``step``."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    headers = re.finditer(r"^--- step (\d+)$", text, re.MULTILINE)
    end = next((found.start() for found in headers if int(found[1]) >= step), len(text))
    return text[:end]
