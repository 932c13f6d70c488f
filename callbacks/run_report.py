"""What a run leaves behind when it ends, on the screen and in its folder."""

import textwrap
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.eval_loss import EvalLoss
from callbacks.sample_text import SampleText
from smol.experiments.plots import plot_training

PREFIX = "held_out/bits_per_byte/"


class RunReport(Callback):
    """Prints bits per byte per source, the plots' files, a paragraph and the command to type next.

    With :class:`~callbacks.eval_loss.EvalLoss` it also says what the run has gained per source.

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
        evaluation = next((c for c in trainer.callbacks if isinstance(c, EvalLoss)), EvalLoss())
        before = evaluation.before["metrics"] if evaluation.before else {}
        _print_bits_per_byte(_bits_per_byte(before), _bits_per_byte(trainer.callback_metrics))
        for callback in trainer.callbacks:
            if isinstance(callback, SampleText) and callback.text:
                print("the model writes")
                print(textwrap.indent(textwrap.fill(callback.text, 76), "  "))
        metrics = folder / "metrics.csv"
        if metrics.exists():
            plot_training(metrics, folder / "training.png", folder.name)
            print(f"plot        {folder / 'training.png'}")
        if picture := evaluation.picture(trainer):
            print(f"plot        {picture}")
        print(f"run folder  {folder}")
        if self.next_command:
            print(f"next        {self.next_command}")


def _bits_per_byte(metrics: dict) -> dict[str, float]:
    """Per source."""
    return {k.removeprefix(PREFIX): float(v) for k, v in metrics.items() if k.startswith(PREFIX)}


def _print_bits_per_byte(before: dict[str, float], after: dict[str, float]) -> None:
    if not after:
        return
    if not before:
        print("held-out bits per byte")
        for name, value in sorted(after.items()):
            print(f"  {name:<24} {value:.3f}")
        return
    print(f"{'held-out bits per byte':<26}{'before':>7}{'after':>8}{'gained':>10}")
    for name, value in sorted(after.items()):
        if name in before:
            print(f"  {name:<24}{before[name]:>7.3f}{value:>8.3f}{before[name] - value:>10.3f}")
        else:
            print(f"  {name:<24}{'-':>7}{value:>8.3f}{'-':>10}")
