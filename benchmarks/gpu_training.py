"""Model FLOPs utilisation of a training step on one GPU: geometries, backends, float8, peers.

python benchmarks/gpu_training.py [--minutes 9] [--model 135m 360m 1b 3b] [--context 4096 32768]
    [--ways smol transformers liger litgpt torchtitan] [--attention varlen flex]
    [--compile block none] [--float8 none tensorwise] [--peak FLOPS] [--no-record]

A step is forward, loss, backward, clipping and fused AdamW; weights in float32, products in
bfloat16 under autocast; rows are packed documents. Each case has a process of its own, tries
activation checkpointing from none to full, doubles its micro-batch until memory is full, and ends
in a row: the best it has found. What has not begun when the minutes are over is left out and named.

MFU counts attention by document, of the peak in dense bfloat16, for float8 and for peers who attend
across documents, too. A peer compiles as its authors do, unless --compile is none.

Not yet run on a GPU. On a processor ``--model smallest --context 128 --attention sdpa
--compile none --peak 1e11`` shows that everything runs.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from typing import Any, get_args

import torch
from gpu_ways import (
    CHECKPOINTING,
    COMPILED,
    MODELS,
    WAYS,
    Case,
    attentions,
    is_installed,
    make_batch,
)
from results import record, table
from training_peers import BETAS, CLIP, EPS, LEARNING_RATE, WEIGHT_DECAY

from smol.model.float8 import Float8
from smol.model.flops import flops_per_token_packed, num_parameters
from smol.model.peak_flops import peak_flops

WARM_STEPS, STEPS, ROUNDS = 3, 5, 2
VERSIONS = ("torch", "transformers", "liger-kernel", "litgpt", "torchtitan", "torchao")


class Training:
    """Steps of one way; the micro-batch changes from call to call.

    Args:
        case: What is trained.
        checkpointing: A kind that the way has.

    Raises:
        ValueError: It has another number of parameters than our decoder of this shape.
    """

    def __init__(self, case: Case, checkpointing: str) -> None:
        self.case = case
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module, self.prepare = WAYS[case.way](case, checkpointing, self.device)
        self.module.train()
        seen, expected = (
            sum(p.numel() for p in self.module.parameters()),
            num_parameters(case.config),
        )
        if seen != expected:
            raise ValueError(f"{case.way} has {seen} parameters, expected {expected}")
        with torch.no_grad():
            for parameter in self.module.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, case.config.init_std)
                else:
                    parameter.fill_(1.0)
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=LEARNING_RATE,
            betas=BETAS,
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )

    def start(self, rows: int) -> list[int]:
        """Warm up with a micro-batch of so many rows; returns the lengths of its documents."""
        torch._dynamo.reset()  # it would give up compiling the same code after a few shapes
        batch = make_batch(self.case, rows, self.device)
        self.loss = self.prepare(batch)
        for _ in range(WARM_STEPS):
            self.step()
        return list(batch.lengths)

    def step(self) -> torch.Tensor:
        """Take a step; returns the loss before it, a scalar on the device."""
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), CLIP, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def seconds(self) -> float:
        """Seconds per step, the mean of some."""
        self.wait()
        began = time.perf_counter()
        for _ in range(STEPS):
            self.step()
        self.wait()
        return (time.perf_counter() - began) / STEPS

    def wait(self) -> None:
        """Until the device has nothing more to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def compile_for_one_shape() -> None:
    """Let the compiler not generalise over micro-batches, of which a run has one."""
    torch._dynamo.config.automatic_dynamic_shapes = False


def measure(case: Case, peak: float, most_tokens: int) -> None:
    """Print a line of JSON for each better setting that is found; the parent keeps the last one.

    Args:
        case: What is trained.
        peak: Operations per second that count as 100 %.
        most_tokens: Of a micro-batch.
    """
    cuda, best = torch.cuda.is_available(), 0.0
    for checkpointing in CHECKPOINTING[case.way]:
        rows, fits, training = 1, True, None
        while fits and rows * case.context <= max(most_tokens, case.context):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            try:
                training = training or Training(case, checkpointing)
                lengths = training.start(rows)
                seconds = [training.seconds() for _ in range(ROUNDS)]
            except torch.OutOfMemoryError:
                fits = False
                break
            tokens, mean = rows * case.context, sum(seconds) / ROUNDS
            flops = flops_per_token_packed(case.config, lengths) * tokens
            found = {
                "documents apart": "yes" if case.documents_apart else "no",
                "checkpointing": checkpointing,
                "micro-batch tokens": tokens,
                "tokens/s": tokens / mean,
                "spread %": 100 * (max(seconds) - min(seconds)) / mean,
                "MFU %": 100 * flops / mean / peak,
                "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
                "parameters M": num_parameters(case.config) / 1e6,
            }
            if tokens / mean > best:
                best = tokens / mean
                print(json.dumps(found), flush=True)
            rows *= 2
        training = None  # its memory, before the next one is built
        if cuda:
            torch.cuda.empty_cache()
        if fits:  # less memory would not be faster
            return


def run(case: Case, seconds: float, *options: str) -> dict[str, Any]:
    """The best row of a case that its process has found in so many seconds."""
    command = [sys.executable, __file__, "--only", json.dumps(asdict(case)), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        output, failure = done.stdout, done.stderr if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        output, failure = (late.stdout or b"").decode(), "out of time"
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if failure or not found:
        reason = (failure.strip().splitlines() or ["no step fits into the memory"])[-1]
        print(f"{'cut short' if found else 'no row'}: {asdict(case)}: {reason}")
    return asdict(case) | found[-1] if found else {}


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """What was asked for and can run here, ours and peers of a shape together."""
    ways = [way for way in args.ways if way == "smol" or is_installed(way)]
    for way in args.ways:
        if way not in ways:
            print(f"{way} is left out: it is not installed; see benchmarks/README.md")
    for model, context, way in product(args.model, args.context, ways):
        if way == "smol":
            for each in product(args.attention, args.compile, args.float8):
                yield Case(way, model, context, *each)
            continue
        backends = attentions(way)
        wanted = [name for name in backends if name in (args.peer_attention or backends)]
        compiled = "none" if args.compile == ["none"] else COMPILED[way]
        for attention in wanted:
            yield Case(way, model, context, attention, compiled)


def comparison(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each geometry and context: our best in bfloat16 and in float8, and the best peer."""
    compared = []
    for model, context in dict.fromkeys((row["model"], row["context"]) for row in rows):
        here = [row for row in rows if (row["model"], row["context"]) == (model, context)]
        ours, eight, peers = (
            max((row for row in here if chosen(row)), key=lambda r: r["tokens/s"], default=None)
            for chosen in (
                lambda row: row["way"] == "smol" and row["float8"] == "none",
                lambda row: row["float8"] != "none",
                lambda row: row["way"] != "smol",
            )
        )
        line = {"model": model, "context": context}
        if ours and peers:
            line["best peer"] = f"{peers['way']} {peers['attention']}"
            line["ours / best peer"] = ours["tokens/s"] / peers["tokens/s"]
        if ours and eight:
            line[f"float8 {eight['float8']} / bfloat16"] = eight["tokens/s"] / ours["tokens/s"]
        if len(line) > 2:
            compared.append(line)
    return compared


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--case_minutes", type=float, default=3, help="after which one is cut off")
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=[*MODELS][:-1])
    parser.add_argument("--context", nargs="+", type=int, default=[4096, 32_768])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["smol"])
    parser.add_argument("--attention", nargs="+", default=["varlen", "flex"], help="of ours")
    parser.add_argument("--peer_attention", nargs="+", help="of the peers, by their names")
    parser.add_argument(
        "--compile", nargs="+", choices=["none", "block", "whole"], default=["block"]
    )
    parser.add_argument("--float8", nargs="+", choices=get_args(Float8), default=["none"])
    parser.add_argument("--most_tokens", type=int, default=131_072, help="of a micro-batch")
    parser.add_argument("--peak", type=float, help="operations per second, if not in the table")
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    peak = args.peak or peak_flops(name)
    if peak is None:
        parser.error(f"the peak of {name} is not known, expected --peak OPERATIONS_PER_SECOND")
    if args.only:
        compile_for_one_shape()
        return measure(Case(**json.loads(args.only)), peak, args.most_tokens)
    began, rows = time.monotonic(), []
    for case in cases(args):
        left = 60 * args.minutes - (time.monotonic() - began)
        if left < 20:
            print(f"left out, the {args.minutes:g} minutes are over: {asdict(case)}")
            continue
        options = "--peak", str(peak), "--most_tokens", str(args.most_tokens)
        if row := run(case, min(left, 60 * args.case_minutes), *options):
            rows.append(row)
            print(table([row]), flush=True)
    if compared := comparison(rows):
        print(table(compared))
    if rows and not args.no_record:
        print(f"kept in {record('gpu_training', rows, VERSIONS)}")
    return None


if __name__ == "__main__":
    main()
