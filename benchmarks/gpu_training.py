"""Model FLOPs utilisation of a training step on one GPU: geometries, backends, checkpointing.

python benchmarks/gpu_training.py [--minutes 9] [--model 135m 360m 1b 3b] [--context 4096 32768]
    [--attention varlen flex] [--compile block none] [--peak FLOPS] [--no-record]

A step is forward, chunked loss, backward, clipping and fused AdamW; weights in float32, products in
bfloat16 under autocast; rows are packed documents that do not see each other. Each case has a
process of its own, tries activation checkpointing from none to full, doubles its micro-batch until
memory is full, and ends in a row: the best it has found. What has not begun when the minutes are
over is left out and named. MFU counts attention by document, of the peak in dense bfloat16.

Not yet run on a GPU. On a processor ``--model smallest --peak 1e11`` shows that everything runs.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from functools import partial
from itertools import product
from typing import Any

import torch
from results import record, table

from smol.losses import linear_cross_entropy
from smol.model import Decoder, DecoderConfig, RopeConfig, init_weights
from smol.model.flops import flops_per_token_packed, num_parameters
from smol.model.peak_flops import peak_flops

SMOLLM2 = {"vocab_size": 49_152, "num_kv_heads": 3, "tie_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "135m": SMOLLM2
    | {"hidden_size": 576, "num_layers": 30, "num_heads": 9, "intermediate_size": 1536},
    "360m": SMOLLM2
    | {"hidden_size": 960, "num_layers": 32, "num_heads": 15, "num_kv_heads": 5}
    | {"intermediate_size": 2560},
    "1b": {"vocab_size": 128_256, "hidden_size": 2048, "num_layers": 16, "num_heads": 16}
    | {"num_kv_heads": 4, "intermediate_size": 8192, "tie_embeddings": True},
    "3b": {"vocab_size": 128_256, "hidden_size": 2048, "num_layers": 36, "num_heads": 16}
    | {"num_kv_heads": 4, "intermediate_size": 11_008, "nope": 4, "tie_embeddings": True},
    "smallest": {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
    | {"num_kv_heads": 1, "intermediate_size": 64, "nope": 2},
}
CHECKPOINTING = ("none", "selective", "full")
MEAN_DOCUMENT = 1000  # tokens
WARM_STEPS, STEPS = 3, 5


def document_numbers(rows: int, context: int, device: torch.device) -> tuple[torch.Tensor, list]:
    """Numbers of packed documents, ``(rows, context)`` int64, and their lengths."""
    rng, lengths = random.Random(0), []
    for _ in range(rows):
        left = context
        while left:
            lengths.append(min(left, 1 + int(rng.expovariate(1 / MEAN_DOCUMENT))))
            left -= lengths[-1]
    counts = torch.tensor(lengths)
    numbers = torch.arange(len(lengths)).repeat_interleave(counts).view(rows, context)
    return numbers.to(device), lengths


class Training:
    """Steps of one model; the micro-batch changes from call to call."""

    def __init__(self, case: dict[str, Any], checkpointing: str) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config, self.context = DecoderConfig(**MODELS[case["model"]]), case["context"]
        with torch.device("meta"):
            rope = RopeConfig(theta=50_000.0)
            self.decoder = Decoder(self.config, rope, case["attention"], checkpointing)
        self.decoder.to_empty(device=self.device)
        init_weights(self.decoder, seed=0)
        if case["compile"] == "block":
            for layer in self.decoder.model.layers:
                layer.compile()
        elif case["compile"] == "whole":
            self.decoder.compile()
        self.optimizer = torch.optim.AdamW(self.decoder.parameters(), lr=1e-4, fused=True)

    def seconds(self, rows: int) -> tuple[float, list[int]]:
        """Seconds per step at ``rows`` sequences, and the lengths of their documents."""
        shape = (rows, self.context + 1)
        tokens = torch.randint(self.config.vocab_size, shape, device=self.device)
        documents, lengths = document_numbers(rows, self.context, self.device)
        for step in range(WARM_STEPS + STEPS):
            if step == WARM_STEPS:
                self._wait()
                began = time.perf_counter()
            self._step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents)
        self._wait()
        return (time.perf_counter() - began) / STEPS, lengths

    def _step(self, tokens: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor) -> None:
        head = partial(linear_cross_entropy, targets=targets, ignore_index=None)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.decoder(tokens, documents=documents, head=head)[0].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(case: dict[str, Any]) -> None:
    """Print a line of JSON for each better way that is found; the parent keeps the last one."""
    best = 0.0
    for checkpointing in CHECKPOINTING:
        rows, fits = 1, True
        while fits and rows * case["context"] <= case["most_tokens"]:
            try:
                if rows == 1:
                    training = Training(case, checkpointing)
                seconds, lengths = training.seconds(rows)
            except torch.OutOfMemoryError:
                fits = False
                break
            tokens = rows * case["context"]
            flops = flops_per_token_packed(training.config, lengths) * tokens
            memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            found = {
                "parameters M": num_parameters(training.config) / 1e6,
                "checkpointing": checkpointing,
                "micro-batch tokens": tokens,
                "tokens/s": tokens / seconds,
                "MFU %": 100 * flops / seconds / case["peak"],
                "peak GiB": memory / 2**30,
            }
            if tokens / seconds > best:
                best = tokens / seconds
                print(json.dumps(found), flush=True)
            rows *= 2
        training = None  # its memory, before the next one is built
        if fits:  # less memory would not be faster
            return


def run(case: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The best row of a case that its process has found in so many seconds."""
    row = {key: case[key] for key in ("model", "context", "attention", "compile")}
    command = [sys.executable, __file__, "--only", json.dumps(case)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        output, failure = done.stdout, done.stderr if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        output, failure = (late.stdout or b"").decode(), "out of time"
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if found:
        return row | found[-1]
    print(f"{row}: {(failure.strip().splitlines() or ['no step fits into the memory'])[-1]}")
    return {}


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=[*MODELS][:-1])
    parser.add_argument("--context", nargs="+", type=int, default=[4096, 32_768])
    parser.add_argument("--attention", nargs="+", default=["varlen", "flex"])
    parser.add_argument(
        "--compile", nargs="+", choices=["none", "block", "whole"], default=["block"]
    )
    parser.add_argument("--most_tokens", type=int, default=131_072, help="of a micro-batch")
    parser.add_argument("--peak", type=float, help="operations per second, if not in the table")
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        return measure(json.loads(args.only))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    peak = args.peak or peak_flops(name)
    if peak is None:
        parser.error(f"the peak of {name} is not known, expected --peak OPERATIONS_PER_SECOND")
    began, rows = time.monotonic(), []
    for model, context, attention, compiled in product(
        args.model, args.context, args.attention, args.compile
    ):
        case = {"model": model, "context": context, "attention": attention, "compile": compiled}
        left = 60 * args.minutes - (time.monotonic() - began)
        if left < 20:
            print(f"left out, the {args.minutes:g} minutes are over: {case}")
            continue
        case |= {"peak": peak, "most_tokens": max(args.most_tokens, context)}
        if row := run(case, left):
            rows.append(row)
            print(table([row]), flush=True)
    if rows and not args.no_record:
        print(f"kept in {record('gpu_training', rows)}")
    return None


if __name__ == "__main__":
    main()
