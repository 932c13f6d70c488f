"""Seconds that a command takes: ``--help``, ``fit --help``, and a run of one step.

python benchmarks/start.py [--repeats 5] [--no-record] [FLAGS OF TRAIN for the run]

Each is a process of its own, from its start to its end, and the figure the median; the ratio is
that of medians. Beside it stands the floor, a process that does what the command cannot do without:
for help Python's own start, for a run the imports of torch and lightning. The run is stage 1, whose
data the first run makes, without validation, samples, report and checkpoint; other
flags choose another one.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from results import record, table

ROOT = Path(__file__).resolve().parents[1]
TRAIN = [sys.executable, str(ROOT / "src" / "train.py")]
ENVIRONMENT = {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
LEFT_OUT = ("eval_loss", "sample_text", "run_report", "checkpoint")


def seconds(command: Sequence[str]) -> float:
    """Run a command to its end; return what it took."""
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT | os.environ, capture_output=True, text=True
    )
    taken = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return taken


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-record", action="store_true")
    args, flags = parser.parse_known_args()
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}, expected at least 1")
    with tempfile.TemporaryDirectory() as folder:
        run = [*TRAIN, "fit", "--config", "configs/stage1.yaml", "--runs_dir", folder]
        run += ["--name", "start", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
        run += [word for name in LEFT_OUT for word in (f"--callbacks.{name}", "null")]
        commands = {
            "--help": ([*TRAIN, "--help"], [sys.executable, "-c", ""]),
            "fit --help": ([*TRAIN, "fit", "--help"], [sys.executable, "-c", ""]),
            "run of one step": (
                [*run, *flags],
                [sys.executable, "-c", "import torch, lightning.pytorch"],
            ),
        }
        rows = []
        for name, pair in commands.items():
            for command in pair:  # files come into memory
                seconds(command)
            taken = [tuple(seconds(command) for command in pair) for _ in range(args.repeats)]
            ours, floor = (statistics.median(times) for times in zip(*taken, strict=True))
            rows.append(
                {
                    "command": name,
                    "seconds": ours,
                    "floor, seconds": floor,
                    "ratio": ours / floor,
                    "repeats": args.repeats,
                    "threads": torch.get_num_threads(),
                }
            )
    print(table(rows))
    if not args.no_record:
        print(f"wrote {record('start', rows, packages=('torch', 'lightning'))}")


if __name__ == "__main__":
    main()
