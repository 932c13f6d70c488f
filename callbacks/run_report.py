"""What a run leaves behind when it ends, on the screen and in its folder."""

import textwrap
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from callbacks.eval_loss import EvalLoss
from callbacks.sample_text import SampleText
from smol.data.card import write_json
from smol.errors import one_line
from smol.experiments.plots import plot_training
from smol.experiments.records import ENVIRONMENT, METRICS, environment
from smol.experiments.report import write_run_report

BITS = "held_out/bits_per_byte/"
REWARDS = ("held_out/ranking", "held_out/rewards/accuracies", "held_out/rewards/margins")


class RunReport(Callback):
    """Prints bits per byte per source, the plots' files, a paragraph and the command to type next.

    Of a preference run it prints how often held-out rewards are in the right order, and by which
    margin. With :class:`~callbacks.eval_loss.EvalLoss` it also says what the run has gained.

    ``report.md`` and ``report.html`` in the run folder hold that and more: curves, events,
    settings, checkpoints, and the ``environment.json`` written at the start. They need metrics of
    :class:`~smol.experiments.CSVLogger`. If they cannot be made there is a warning, and the run
    ends as it does without them.

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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / ENVIRONMENT, environment())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        print(f"\n{folder.name}: {trainer.global_step:,} steps")
        evaluation = next((c for c in trainer.callbacks if isinstance(c, EvalLoss)), EvalLoss())
        before = evaluation.before["metrics"] if evaluation.before else {}
        after = trainer.callback_metrics
        _print_table("held-out bits per byte", _below(BITS, before), _below(BITS, after), -1)
        _print_table("held-out rewards", _below(REWARDS, before), _below(REWARDS, after), 1)
        for callback in trainer.callbacks:
            if isinstance(callback, SampleText) and callback.text:
                print("the model writes")
                print(textwrap.indent(textwrap.fill(callback.text, 76), "  "))
        if (folder / METRICS).exists():
            _draw(folder)
        if picture := evaluation.picture(trainer):
            print(f"plot        {picture}")
        print(f"run folder  {folder}")
        if self.next_command:
            print(f"next        {self.next_command}")


def _draw(folder: Path) -> None:
    """Make plot and report; whatever goes wrong, the run has ended well."""
    try:
        plot_training(folder / METRICS, folder / "training.png", folder.name)
        print(f"plot        {folder / 'training.png'}")
        print(f"report      {write_run_report(folder)}")
    except Exception as error:
        rank_zero_warn(f"the report of {folder} could not be written: {one_line(error)}")


def _below(prefix: str | tuple[str, ...], metrics: dict) -> dict[str, float]:
    """The metrics whose names begin so, by the last part of their names."""
    return {k.split("/", 2)[-1]: float(v) for k, v in metrics.items() if k.startswith(prefix)}


def _print_table(
    title: str, before: dict[str, float], after: dict[str, float], better: int
) -> None:
    """Print values by name; ``better`` is 1 if larger ones are, else -1."""
    if not after:
        return
    if not before:
        print(title)
        for name, value in sorted(after.items()):
            print(f"  {name:<24} {value:.3f}")
        return
    print(f"{title:<26}{'before':>7}{'after':>8}{'gained':>10}")
    for name, value in sorted(after.items()):
        if name in before:
            gained = better * (value - before[name])
            print(f"  {name:<24}{before[name]:>7.3f}{value:>8.3f}{gained:>10.3f}")
        else:
            print(f"  {name:<24}{'-':>7}{value:>8.3f}{'-':>10}")
