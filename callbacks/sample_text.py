"""Lets the model write."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from smol.generation import generate


class SampleText(Callback):
    """Writes a paragraph when training ends, into ``samples.txt``; needs a tokenizer in the data.

    .. code-block:: yaml

        callbacks:
          sample_text:
            class_path: callbacks.SampleText
            init_args: {prompt: "The ", tokens: 120}

    Args:
        prompt: How the paragraph begins; may be empty.
        tokens: Its length at most.
        temperature: Of the sampling.
        top_p: Of the sampling.
    """

    order = 500

    def __init__(
        self, prompt: str = "", tokens: int = 120, temperature: float = 0.7, top_p: float = 0.95
    ):
        self.prompt, self.tokens = prompt, tokens
        self.temperature, self.top_p = temperature, top_p
        self.text: str | None = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule
        tokenizer = getattr(data, "tokenizer", None)
        if tokenizer is None:
            return
        training = pl_module.training
        pl_module.eval()
        with trainer.precision_plugin.forward_context():
            new = generate(
                pl_module.decoder,
                # A text begins after the end of the one before it.
                [tokenizer.eos_id, *tokenizer.encode(self.prompt)],
                self.tokens,
                data.context_length,
                self.temperature,
                self.top_p,
                stop=[tokenizer.eos_id],
                seed=0,  # the same on all ranks, which write together
            )
        pl_module.train(training)
        self.text = self.prompt + tokenizer.decode(new)
        if trainer.is_global_zero:
            with open(Path(trainer.default_root_dir, "samples.txt"), "a", encoding="utf-8") as file:
                file.write(f"--- step {trainer.global_step}\n{self.text}\n")
