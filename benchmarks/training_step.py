"""Tokens per second of a training step: ours, transformers and litgpt, in turn.

python benchmarks/training_step.py [--litgpt PYTHON] [--rounds 15] [--model 135m nano]
    [--context 512 2048] [--precision bfloat16 float32] [--compile] [--no-record]

Each way runs in a process of its own, so that its peak memory is its own, and waits while another
one works. A round times every way once; a ratio is the median of the rounds' ratios, with its 95 %
interval. The work is the same: forward, loss, backward, clipping and fused AdamW on a batch of
2,048 tokens. The limit is the rate at which this processor multiplies 2048 x 2048 matrices.
PYTHON is the interpreter of an environment with litgpt (see benchmarks/README.md); without it
litgpt is left out.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pairs import median_interval
from results import record, table
from training_peers import WAYS, Job

from smol.model import DecoderConfig
from smol.model.flops import flops_per_token_packed

MODELS: dict[str, tuple[dict[str, Any], float]] = {
    "135m": (
        {
            "vocab_size": 49_152,
            "hidden_size": 576,
            "num_layers": 30,
            "num_heads": 9,
            "num_kv_heads": 3,
            "intermediate_size": 1536,
        },
        100_000.0,
    ),
    "nano": (
        {
            "vocab_size": 4096,
            "hidden_size": 192,
            "num_layers": 8,
            "num_heads": 3,
            "num_kv_heads": 1,
            "intermediate_size": 512,
            "nope": 4,
        },
        50_000.0,
    ),
    "smallest": (  # shows that everything runs
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": 1,
            "intermediate_size": 64,
            "nope": 2,
        },
        10_000.0,
    ),
}
"""Fields of the decoder and rope's theta: SmolLM2-135M, and that of configs/base.yaml."""
BATCH_TOKENS = 2048
MEAN_DOCUMENT = 400


class Way:
    """A process that trains when it is told to."""

    def __init__(self, python: str, job: Job) -> None:
        self.job = job
        script = Path(__file__).with_name("training_peers.py")
        self.process = subprocess.Popen(
            [python, script, json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.name = job.way + (" compiled" if job.compile else "")
        ready = self._answer()
        self.loss, self.parameters, self.torch = (ready[k] for k in ("loss", "parameters", "torch"))

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.job.way} ended early:\n{self.process.stderr.read()[-2000:]}")
        return json.loads(line)

    def seconds(self, steps: int) -> float:
        """Take steps; return what they took."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> float:
        """End the process; return its peak memory in MiB."""
        self.process.stdin.close()
        peak = self._answer()
        self.process.wait()
        return peak


def document_lengths(rows: int, time: int) -> list[int]:
    """Lengths of documents that fill rows of ``time`` tokens, the last of each row cut short."""
    rng, lengths = random.Random(0), []
    for _ in range(rows):
        left = time
        while left:
            length = min(left, 1 + int(rng.expovariate(1 / MEAN_DOCUMENT)))
            lengths.append(length)
            left -= length
    return lengths


def matmul_rate(
    dtype: torch.dtype, process_time: bool, size: int = 2048, repeats: int = 5
) -> float:
    """Operations per second of a product of square matrices: the best of some."""
    clock = time.process_time if process_time else time.perf_counter
    left, right = torch.randn(2, size, size).to(dtype)
    best = float("inf")
    for _ in range(repeats):
        began = clock()
        left @ right
        best = min(best, clock() - began)
    return 2 * size**3 / best


def compare(ways: list[Way], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds per step of each way, round by round; each begins a round in its turn."""
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for number in range(rounds):
        first = number % len(ways)
        for way in ways[first:] + ways[:first]:
            seconds[way.name].append(way.seconds(steps) / steps)
    return seconds


def measure(args: argparse.Namespace, model: str, context: int, precision: str) -> list[dict]:
    """All ways on one model, context and precision; rows of the table."""
    decoder, theta = MODELS[model]
    rows = max(BATCH_TOKENS // context, 1)
    lengths = document_lengths(rows, context)
    tokens, process_time = rows * context, args.clock == "processor"
    pythons = {"smol": sys.executable, "transformers": sys.executable, "litgpt": args.litgpt}
    ways = [
        Way(
            python,
            Job(
                way, decoder, theta, rows, lengths, precision == "bfloat16", compiled, process_time
            ),
        )
        for way, python in pythons.items()
        for compiled in ([False, True] if args.compile else [False])
        if python and way in args.ways
    ]
    if len(parameters := {way.parameters for way in ways}) > 1:
        sys.exit(f"the ways do not train the same model: {parameters} parameters.")
    steps = args.steps or (10 if model != "135m" else 1)
    seconds = compare(ways, args.rounds, steps)
    rate = matmul_rate(getattr(torch, precision), process_time)
    flops = flops_per_token_packed(DecoderConfig(**decoder), lengths) * tokens
    ours = min((w.name for w in ways if w.job.way == "smol"), key=lambda n: sum(seconds[n]))
    made = []
    for way in ways:
        ratios = [a / b for a, b in zip(seconds[way.name], seconds[ours], strict=True)]
        middle, low, high = median_interval(ratios)
        typical = statistics.median(seconds[way.name])
        made.append(
            {
                "model": model,
                "context": context,
                "precision": precision,
                "way": way.name,
                "tokens/s": tokens / typical,
                "time relative to ours": middle,
                "95 % interval": f"{low:.3f} to {high:.3f}",
                "share of matmul rate": flops / typical / rate,
                "GFLOP/s of matmul": rate / 1e9,
                "peak MiB": way.end(),
                "rounds": args.rounds,
                "clock": args.clock,
                "threads": torch.get_num_threads(),
                "documents": len(lengths),
            }
        )
    return made


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--litgpt", metavar="PYTHON", help="interpreter that has litgpt")
    parser.add_argument("--ways", nargs="+", default=["smol", "transformers", "litgpt"])
    parser.add_argument("--model", nargs="+", default=["135m", "nano"], choices=list(MODELS))
    parser.add_argument("--context", nargs="+", type=int, default=[512, 2048])
    parser.add_argument(
        "--precision",
        nargs="+",
        default=["bfloat16", "float32"],
        choices=["bfloat16", "float32"],
    )
    parser.add_argument("--compile", action="store_true", help="each way compiled, too")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, help="of a way in a round")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args()
    if args.litgpt and not shutil.which(args.litgpt):
        parser.error(f"--litgpt {args.litgpt} is no program, expected an environment's bin/python")
    if unknown := sorted(set(args.ways) - set(WAYS)):
        parser.error(f"--ways {unknown[0]} is unknown, expected some of {', '.join(WAYS)}")
    if "smol" not in args.ways:
        parser.error("--ways has no smol, which the others are compared with")
    if min(args.rounds, args.steps or 1, *args.context) < 1:
        parser.error("--rounds, --steps and --context are expected to be at least 1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for model in args.model:
        for context in args.context:
            for precision in args.precision:
                rows = measure(args, model, context, precision)
                print(table(rows), flush=True)
                if not args.no_record:
                    record("training_step", rows, packages=("torch", "transformers"))


if __name__ == "__main__":
    main()
