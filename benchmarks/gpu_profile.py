"""Where the time of a training step on one GPU goes, beside the least that it could take.

python benchmarks/gpu_profile.py [--model 3b] [--context 4096] [--rows 4] [--attention varlen]
    [--compile block] [--checkpointing none] [--float8 none] [--way smol] [--kernels 15]
    [--trace FILE] [--no-record]

A step is profiled, and its kernels are put into groups by their names and by the operations that
launched them. The floor of products, of head and loss, and of attention is their operations
(attention by document) at the rate measured for one large product in bfloat16; that of the
optimiser is the bytes of weights, gradients and moments at the rate measured for a copy. What
recomputes something takes longer than its floor. A gap is the time of a step without the profiler
in which no kernel runs: the processor was late, or waited. A peer's head is among its products.

Not yet run on a GPU. On a processor, where operations take the place of kernels, ``--model smallest
--context 128 --attention sdpa --compile none`` shows that everything runs.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from gpu_training import Training, compile_for_one_shape
from gpu_ways import CHECKPOINTING, MODELS, WAYS, Case
from results import record, table
from torch.profiler import ProfilerActivity, profile

from smol.model import DecoderConfig
from smol.model.float8 import Float8
from smol.model.flops import flops_per_token_packed, num_matmul_parameters, num_parameters

GROUPS = (
    "matrix products",
    "attention",
    "head and loss",
    "optimiser",
    "element-wise and casts",
    "copies and communication",
)
GAPS = "launch gaps"
_COPIES = re.compile(r"nccl|memcpy|memset|c10d", re.I)
_OPTIMISER = re.compile(r"Optimizer\.|_foreach_|fused_adam|multi_tensor_apply")
_HEAD = re.compile(r"LinearCrossEntropy|cross_entropy|nll_loss|log_softmax", re.I)
_ATTENTION = re.compile(r"flash|fmha|attention|_attn", re.I)
_PRODUCTS = re.compile(
    r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitK|triton_tem|^aten::(mm|bmm|addmm|_scaled_mm)$"
)
_LAUNCHES = {"cuda_runtime", "cuda_driver"}
_RANGES = {"cpu_op", "user_annotation"}
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


@dataclass(frozen=True)
class Work:
    """Something that ran.

    Attributes:
        name: Of the kernel, or of the operation on a processor.
        start: In microseconds.
        duration: In microseconds; on a processor without what it called.
        ranges: Names of the operations that it was launched in, the outermost first.
    """

    name: str
    start: float
    duration: float
    ranges: tuple[str, ...]


def read_work(events: Iterable[dict[str, Any]]) -> list[Work]:
    """What ran according to a trace, in the form of Chrome's ``traceEvents``.

    Args:
        events: Of ``torch.profiler``. A kernel and its launch have the same ``correlation``; a
            launch lies within operations of its thread.

    Returns:
        The kernels and copies on the device; the operations on the processor where there are none.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in complete:
        if event.get("cat") in _RANGES | _LAUNCHES:
            threads[event["tid"]].append(event)
    around: dict[Any, tuple[str, ...]] = {}
    operations: list[Work] = []
    for thread in threads.values():
        open_ranges: list[tuple[dict[str, Any], list[float]]] = []
        # Of two that begin together, the longer one is around the other.
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while open_ranges and _end(open_ranges[-1][0]) <= event["ts"]:
                operations.append(_close(open_ranges))
            if event["cat"] in _RANGES:
                if open_ranges:
                    open_ranges[-1][1].append(event["dur"])
                open_ranges.append((event, []))
            else:
                names = tuple(parent["name"] for parent, _ in open_ranges)
                around[event.get("args", {}).get("correlation")] = names
        while open_ranges:
            operations.append(_close(open_ranges))
    kernels = [
        Work(
            event["name"],
            event["ts"],
            event["dur"],
            around.get(event.get("args", {}).get("correlation"), ()),
        )
        for event in complete
        if event.get("cat") in _ON_DEVICE
    ]
    return kernels or operations


def _end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]


def _close(open_ranges: list[tuple[dict[str, Any], list[float]]]) -> Work:
    """Take the innermost range off; its time is what its children leave."""
    event, children = open_ranges.pop()
    outer = tuple(parent["name"] for parent, _ in open_ranges)
    return Work(event["name"], event["ts"], max(event["dur"] - sum(children), 0.0), outer)


def group_of(work: Work) -> str:
    """The group that a kernel, or an operation, belongs to."""
    names = (*work.ranges, work.name)
    if _COPIES.search(work.name):
        return "copies and communication"
    for group, pattern in (
        ("optimiser", _OPTIMISER),
        ("head and loss", _HEAD),
        ("attention", _ATTENTION),
    ):
        if any(pattern.search(name) for name in names):
            return group
    innermost = work.ranges[-1] if work.ranges else ""
    if _PRODUCTS.search(work.name) or _PRODUCTS.search(innermost):
        return "matrix products"
    return "element-wise and casts"


def busy(work: Sequence[Work]) -> float:
    """Microseconds in which at least one of them runs."""
    total, end = 0.0, float("-inf")
    for each in sorted(work, key=lambda w: w.start):
        total += max(each.start + each.duration - max(each.start, end), 0.0)
        end = max(end, each.start + each.duration)
    return total


def floors(
    config: DecoderConfig, lengths: Sequence[int], product_rate: float, copy_rate: float
) -> dict[str, float]:
    """The least seconds of a step, by group.

    Args:
        config: Shape of the decoder.
        lengths: Of the documents of the step.
        product_rate: Operations per second.
        copy_rate: Bytes per second, read and written.
    """
    tokens = sum(lengths)
    head = config.vocab_size * config.hidden_size
    layers = num_matmul_parameters(config) - head
    attention = flops_per_token_packed(config, lengths) - 6.0 * (layers + head)
    # AdamW in float32 reads weight, gradient and two moments, and writes all but the gradient.
    optimiser = 4 * (4 + 3) * num_parameters(config)
    return {
        "matrix products": 6.0 * layers * tokens / product_rate,
        "attention": attention * tokens / product_rate,
        "head and loss": 6.0 * head * tokens / product_rate,
        "optimiser": optimiser / copy_rate,
    }


def breakdown(
    work: Sequence[Work], seconds: float, least: dict[str, float]
) -> list[dict[str, Any]]:
    """Rows of the table: milliseconds, share of the step and floor of each group, gaps, and all.

    Args:
        work: Of one step.
        seconds: That a step takes without the profiler.
        least: From :func:`floors`.
    """
    times = dict.fromkeys(GROUPS, 0.0)
    for each in work:
        times[group_of(each)] += each.duration / 1e6
    times[GAPS] = max(seconds - busy(work) / 1e6, 0.0)
    rows = [
        {"group": group, "ms": 1e3 * time, "share %": 100 * time / seconds}
        | ({"floor ms": 1e3 * least[group]} if group in least else {})
        for group, time in times.items()
    ]
    total = {"group": "step", "ms": 1e3 * seconds, "share %": 100.0}
    return [*rows, total | {"floor ms": 1e3 * sum(least.values())}]


def longest(work: Sequence[Work], count: int) -> list[dict[str, Any]]:
    """The kernels that take most time, each name once."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(list)
    for each in work:
        sums[group_of(each), each.name].append(each.duration)
    ranked = sorted(sums.items(), key=lambda item: -sum(item[1]))[:count]
    return [
        {"kernel": name[:80], "group": group, "calls": len(took), "ms": sum(took) / 1e3}
        for (group, name), took in ranked
    ]


def rate(function: Callable[[], Any], amount: float, device: torch.device, repeats: int) -> float:
    """An amount per second, from the median of some calls, each waited for."""
    times = []
    for _ in range(repeats + 3):
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return amount / statistics.median(times[3:])


def measured_rates(device: torch.device) -> tuple[float, float]:
    """Operations per second of a product in bfloat16, and bytes per second of a copy."""
    size, numbers = (8192, 2**28) if device.type == "cuda" else (1024, 2**22)
    left, right = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    product = rate(lambda: left @ right, 2 * size**3, device, repeats=20)
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    return product, rate(lambda: target.copy_(source), 2 * source.nbytes, device, repeats=20)


def profile_step(training: Training, trace: Path) -> list[Work]:
    """Run one step under the profiler; its trace is kept at a path."""
    watched = [ProfilerActivity.CPU]
    if training.device.type == "cuda":
        watched.append(ProfilerActivity.CUDA)
    training.wait()
    with profile(activities=watched, acc_events=False) as p:
        training.step()
        training.wait()
    p.export_chrome_trace(str(trace))
    return read_work(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="3b")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=4, help="sequences of the micro-batch")
    parser.add_argument("--way", choices=list(WAYS), default="smol")
    parser.add_argument("--attention", default="varlen", help="by the way's own name")
    parser.add_argument("--compile", choices=["none", "block", "whole"], default="block")
    parser.add_argument("--checkpointing", default="none")
    parser.add_argument("--float8", choices=get_args(Float8), default="none")
    parser.add_argument("--kernels", type=int, default=15, help="of the longest to name")
    parser.add_argument("--trace", type=Path, help="keep it here, for chrome://tracing")
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args()
    if args.checkpointing not in CHECKPOINTING[args.way]:
        parser.error(
            f"--checkpointing {args.checkpointing} is not among those of {args.way}, "
            f"expected one of {', '.join(CHECKPOINTING[args.way])}"
        )
    compile_for_one_shape()
    case = Case(args.way, args.model, args.context, args.attention, args.compile, args.float8)
    training = Training(case, args.checkpointing)
    rates = measured_rates(training.device)
    lengths = training.start(args.rows)
    seconds = training.seconds()
    with tempfile.TemporaryDirectory() as folder:
        work = profile_step(training, args.trace or Path(folder) / "trace.json")
    rows = breakdown(work, seconds, floors(case.config, lengths, *rates))
    print(table(rows))
    print(table(longest(work, args.kernels)))
    print(f"a product runs at {rates[0] / 1e12:.4g} TFLOP/s, a copy at {rates[1] / 1e9:.4g} GB/s")
    if not args.no_record:
        setting = vars(case) | {"checkpointing": args.checkpointing, "tokens": sum(lengths)}
        setting |= {"TFLOP/s of a product": rates[0] / 1e12, "GB/s of a copy": rates[1] / 1e9}
        print(f"kept in {record('gpu_profile', [setting | row for row in rows])}")


if __name__ == "__main__":
    main()
