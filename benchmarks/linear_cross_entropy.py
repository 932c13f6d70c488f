"""Time and peak memory of the loss: ours, the naive one, and torch's chunked one where it exists.

python benchmarks/linear_cross_entropy.py [--repeats 5] [--shape VOCAB HIDDEN TOKENS ...]
    [--no-record]

Each way runs in a process of its own, so that its peak memory is its own: the growth of the
resident set from just before the loss (inputs in place, libraries warm) to its highest point, over
forward and backward. Gradients of the inputs are part of it. Times are medians.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from results import record, table

SHAPES = [(4096, 256, 4096), (49_152, 576, 2048), (128_256, 576, 2048)]
WAYS = ["naive", "torch", "ours"]


def loss_function(way: str):
    """Return ``fn(hidden, weight, targets)`` that gives the mean loss, or None where absent."""
    if way == "naive":
        return lambda hidden, weight, targets: F.cross_entropy(
            F.linear(hidden, weight).float(), targets
        )
    if way == "torch":
        try:
            from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions
        except ImportError:
            return None
        return partial(F.linear_cross_entropy, options=LinearCrossEntropyOptions())
    from smol.losses import linear_cross_entropy

    return lambda *inputs: linear_cross_entropy(*inputs)[0].mean()


def peak_mebibytes() -> float:
    """Highest resident set of this process so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(way: str, shape: tuple[int, int, int], autocast: bool, repeats: int) -> dict:
    """Run one way in this process; return seconds and MiB."""
    function = loss_function(way)
    if function is None:
        return {}

    def inputs(vocab: int, size: int, tokens: int):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(tokens, size, generator=generator).requires_grad_()
        weight = torch.randn(vocab, size, generator=generator).mul_(0.02).requires_grad_()
        return hidden, weight, torch.randint(vocab, (tokens,), generator=generator)

    def step(hidden, weight, targets):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = function(hidden, weight, targets)
        middle = time.perf_counter()
        loss.backward()
        return middle - start, time.perf_counter() - middle

    step(*inputs(64, 16, 8))
    large = inputs(*shape)
    before = peak_mebibytes()
    step(*large)
    peak = peak_mebibytes() - before
    forward, backward = zip(*(step(*large) for _ in range(repeats)), strict=True)
    return {
        "forward": statistics.median(forward),
        "backward": statistics.median(backward),
        "peak": peak,
    }


def main() -> None:
    """Measure, print and record a row per shape, precision and way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shape", type=int, nargs=3, action="append", metavar="N")
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(**json.loads(args.only), repeats=args.repeats)))
        return
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}, expected at least 1")
    rows = []
    for shape in args.shape or SHAPES:
        for autocast in (False, True):
            seen = {way: _in_a_process(way, shape, autocast, args.repeats) for way in WAYS}
            new = [_row(shape, autocast, way, seen) for way in WAYS if seen[way]]
            print(table(new), flush=True)
            rows += new
    if not args.no_record:
        print(f"wrote {record('linear_cross_entropy', rows)}")


def _in_a_process(way: str, shape: list[int], autocast: bool, repeats: int) -> dict:
    job = json.dumps({"way": way, "shape": shape, "autocast": autocast})
    command = [sys.executable, __file__, "--only", job, "--repeats", str(repeats)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def _row(shape: list[int], autocast: bool, way: str, seen: dict[str, dict]) -> dict:
    """A row of the table; what naive takes is 1."""
    mine, naive = seen[way], seen["naive"]
    return {
        **dict(zip(("vocab", "hidden", "tokens"), shape, strict=True)),
        "precision": "bf16 autocast" if autocast else "float32",
        "way": way,
        "forward ms": mine["forward"] * 1e3,
        "backward ms": mine["backward"] * 1e3,
        "peak MiB": mine["peak"],
        "time relative to naive": (mine["forward"] + mine["backward"])
        / (naive["forward"] + naive["backward"]),
        "memory relative to naive": mine["peak"] / max(naive["peak"], 1e-9),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
