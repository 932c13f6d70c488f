"""What a run leaves behind when it ends, on the screen and in its folder."""

import textwrap
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.sample_text import SampleText
from smol.experiments.plots import plot_training

PREFIX = "held_out/bits_per_byte/"


class RunReport(Callback):
    """Prints bits per byte per source, the plot's file, a paragraph and the command to type next.

    .. code-block:: yaml

        callbacks:
          run_report:
            class_path: callbacks.RunReport
            init_args: {next_command: "python src/train.py fit --config configs/stage2.yaml"}

    Args:
        next_command: What to type next.
    """

    order = 510  # after SampleText has written; a failure here costs no checkpoint

    def __init__(self, next_command: str | None = None):
        self.next_command = next_command

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        print(f"\n{folder.name}: {trainer.global_step:,} steps")
        measured = {
            name.removeprefix(PREFIX): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(PREFIX)
        }
        if measured:
            print("held-out bits per byte")
            for name, value in sorted(measured.items()):
                print(f"  {name:<24} {value:.3f}")
        for callback in trainer.callbacks:
            if isinstance(callback, SampleText) and callback.text:
                print("the model writes")
                print(textwrap.indent(textwrap.fill(callback.text, 76), "  "))
        metrics = folder / "metrics.csv"
        if metrics.exists():
            plot_training(metrics, folder / "training.png", folder.name)
            print(f"plot        {folder / 'training.png'}")
        print(f"run folder  {folder}")
        if self.next_command:
            print(f"next        {self.next_command}")
