"""What a checkpoint costs a run: its stall, as a share of a save that waits for the upload.

python benchmarks/checkpoint_stall.py [--pairs 30] [--every 5] [--store URL] [FLAGS OF TRAIN]

Two kinds of checkpoints alternate in one run. One goes the way of every run: training waits for the
local copy, and upload, reading back and verification happen beside the next steps. The other waits
for all of it. The share is the mean of the pairs' ratios, with a 95 % interval (Student's t).
Seconds lost are the stall and what the steps after it take longer than those after a checkpoint
that was waited for. Memory is the growth of the resident set over a save and its upload, at its
highest. The store is a folder on the same disk unless --store names another, such as s3://bucket.
"""

import argparse
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from types import MethodType

import psutil
from callback_overhead import WITHOUT, student_t
from lightning import Callback
from results import record, table

from callbacks import CheckpointRotation

FOREVER = 1e6  # seconds


@dataclass
class Save:
    """One checkpoint: seconds of its stall and of the steps after it, and growth of memory."""

    waited: bool
    stall: float
    mebibytes: float = 0.0
    steps: float = 0.0


class HighWater(threading.Thread):
    """The highest resident set of this process since it was asked last, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.process, self.highest = psutil.Process(), 0
        self.start()

    def run(self) -> None:
        while True:
            self.highest = max(self.highest, self.process.memory_info().rss)
            time.sleep(0.002)

    def reset(self) -> int:
        """Return the resident set of now, and begin anew with it."""
        self.highest = self.process.memory_info().rss
        return self.highest


class Alternate(Callback):
    """Makes every second checkpoint wait for its upload, and takes the times."""

    def __init__(self, pairs: int):
        self.pairs, self.saves, self.water = pairs, [], HighWater()

    def on_train_start(self, trainer, pl_module):
        (self.rotation,) = (c for c in trainer.callbacks if isinstance(c, CheckpointRotation))
        plain = type(self.rotation)._save

        def save(rotation: CheckpointRotation, *args, **kwargs) -> None:
            mirror = rotation._rotation.mirror
            self.close()
            waited = len(self.saves) % 2 == 1
            self.before = self.water.reset()
            began = time.perf_counter()
            plain(rotation, *args, **kwargs)
            if waited:
                assert mirror.flush(FOREVER)
            self.ended = time.perf_counter()
            self.saves.append(Save(waited, self.ended - began))
            trainer.should_stop = len(self.saves) > 2 * self.pairs

        self.rotation._save = MethodType(save, self.rotation)

    def close(self) -> None:
        """End the steps after the last checkpoint; its upload, too, if it still goes on."""
        if self.saves:
            last = self.saves[-1]
            last.steps = time.perf_counter() - self.ended
            assert self.rotation._rotation.mirror.flush(FOREVER)
            last.mebibytes = (self.water.highest - self.before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--every", type=int, default=5, help="optimiser steps")
    parser.add_argument("--store", help="default: a folder on the same disk")
    parser.add_argument("--no_record", action="store_true", help="print the figures only")
    options, flags = parser.parse_known_args()
    if options.pairs < 2:
        parser.error("--pairs: an interval needs at least 2")

    from smol.checkpoints.store import FsspecStore
    from smol.cli import main as train

    with tempfile.TemporaryDirectory() as folder:
        line = ["fit", "--config", "configs/stage1.yaml", "--runs_dir", folder]
        line += ["--trainer.max_steps", "1000000", "--trainer.limit_val_batches", "0"]
        line += ["--callbacks.checkpoint.every", str(options.every)]
        line += ["--callbacks.checkpoint.store", options.store or f"{folder}/store"]
        for name in (*WITHOUT, "progress", "source_ledger"):
            line += [] if name == "checkpoint" else [f"--callbacks.{name}", "null"]
        run = train([*line, *flags], run=False)
        alternate = Alternate(options.pairs)
        run.trainer.callbacks.append(alternate)
        run.trainer.fit(run.model, run.datamodule)
        infos = FsspecStore(run.run_folder / "checkpoints").list()
    saves = alternate.saves[1 : 2 * options.pairs + 1]  # the first one finds nothing warm
    report(saves, infos[-1].manifest.bytes, options)


def report(saves: list[Save], size: int, options: argparse.Namespace) -> None:
    """Print the figures, and keep them.

    Args:
        saves: Of both kinds in turn.
        size: Bytes of a checkpoint.
        options: Of the command line.
    """
    waited = [save for save in saves if save.waited]
    beside = [save for save in saves if not save.waited]
    ratios = [b.stall / w.stall for b, w in zip(beside, waited, strict=True)]
    half = student_t(len(ratios) - 1) * statistics.stdev(ratios) / len(ratios) ** 0.5
    slower = [b.steps - w.steps for b, w in zip(beside, waited, strict=True)]
    stall = statistics.mean(save.stall for save in beside)
    row = {
        "store": options.store or "folder",
        "checkpoint MiB": size / 2**20,
        "pairs": len(ratios),
        "stall ms": stall * 1e3,
        "synchronous ms": statistics.mean(save.stall for save in waited) * 1e3,
        "stall share %": statistics.mean(ratios) * 100,
        "± (95 %)": half * 100,
        "lost in all ms": (stall + statistics.mean(slower)) * 1e3,
        "memory MiB": max(save.mebibytes for save in beside),
        "memory synchronous MiB": max(save.mebibytes for save in waited),
    }
    print(table([row]))
    if not options.no_record:
        print(f"kept in {record('checkpoint_stall', row, ('torch', 'lightning', 's3fs'))}")


if __name__ == "__main__":
    main()
