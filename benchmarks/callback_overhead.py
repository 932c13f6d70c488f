"""What callbacks cost: steps with all of them and steps with none, in turn, in one run.

python benchmarks/callback_overhead.py [--pairs 30] [--steps 10] [--callbacks FILE] [FLAGS OF TRAIN]

Blocks of steps with the callbacks of an overlay alternate with blocks without any; a pair is two
neighbours, in an order that changes from pair to pair. The figure is the mean of the pairs' ratios
less one, with a 95 % interval (Student's t). Work that happens once in so many steps (snapshots,
log rows) is part of the blocks in which it falls. Validation, checkpoints and reports are not: they
are what a run is for. ``--null`` measures nothing against nothing, the noise of the machine.
"""

import argparse
import statistics
import tempfile
import time

from lightning import Callback

WITHOUT = ("checkpoint", "sample_text", "run_report", "predictions", "eval_loss", "warmup_check")


class Alternate(Callback):
    """Takes the other callbacks out and puts them back, and takes the time of each block."""

    def __init__(self, pairs: int, steps: int, null: bool):
        self.pairs, self.steps, self.null = pairs, steps, null
        self.seconds: list[tuple[float, float]] = []  # of each pair: with, without

    def on_train_start(self, trainer, pl_module):
        self.all, self.none = trainer.callbacks, [self]
        self.blocks: dict[bool, float] = {}
        self.warm, self.left, self.using = False, 2 * self.steps, True

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop._should_accumulate():
            return
        self.left -= 1
        if self.left:
            return
        now = time.perf_counter()
        if self.warm:
            self.blocks[self.using] = now - self.began
        self.warm, self.left = True, self.steps
        if len(self.blocks) == 2:
            self.seconds.append((self.blocks[True], self.blocks[False]))
            self.blocks = {}
            # The next pair begins as this one ended, so that a drift cancels.
        else:
            self.using = not self.using
        trainer.callbacks = self.all if self.using and not self.null else self.none
        trainer.should_stop = len(self.seconds) == self.pairs
        self.began = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--callbacks", default="configs/callbacks/production.yaml")
    parser.add_argument("--null", action="store_true")
    options, flags = parser.parse_known_args()

    from smol.cli import main as train

    with tempfile.TemporaryDirectory() as folder:
        line = ["fit", "--config", "configs/stage1.yaml", "--config", options.callbacks]
        line += ["--runs_dir", folder, "--trainer.max_steps", "100000"]
        line += [word for name in WITHOUT for word in (f"--callbacks.{name}", "null")]
        run = train([*line, *flags], run=False)
        alternate = Alternate(options.pairs, options.steps, options.null)
        run.trainer.callbacks.append(alternate)
        run.trainer.limit_val_batches = 0
        names = [type(c).__name__ for c in run.trainer.callbacks if c is not alternate]
        run.trainer.fit(run.model, run.datamodule)
    ratios = [one / other - 1 for one, other in alternate.seconds]
    mean, n = statistics.mean(ratios), len(ratios)
    half = student_t(n - 1) * statistics.stdev(ratios) / n**0.5
    step = statistics.median(other for _, other in alternate.seconds) / options.steps
    print(f"callbacks   {', '.join(names) if not options.null else 'none, in both'}")
    print(f"step        {step * 1e3:.1f} ms without")
    interval = f"[{mean - half:+.2%}, {mean + half:+.2%}]"
    print(f"overhead    {mean:+.2%}, 95 % interval {interval}, {n} pairs")


def student_t(freedom: int) -> float:
    """The 97.5 % point of Student's t, by Hill's expansion around the normal one."""
    z = 1.959964
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96)
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


if __name__ == "__main__":
    main()
