"""A pool of processes over the shards of an input, with a progress line."""

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any

from smol.data.documents import Shard
from smol.errors import UserError

# (number of the shard, shard, count(documents, bytes)): does one shard's work
Task = Callable[[int, Shard, Callable[[int, int], None]], None]


def usable_cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def run_shards(
    task: Task,
    shards: dict[int, Shard],
    workers: int | None,
    name: str,
    log: Callable[[str], None],
) -> None:
    """Do the work of every shard.

    Args:
        task: What to do with a shard; it is copied to the processes.
        shards: The shards by number.
        workers: Processes; 0 works in this one; None is one per usable core.
        name: Begins the progress line.
        log: Receives the progress where standard error is not a terminal.

    Raises:
        UserError: A process was killed.
    """
    workers = min(usable_cores() if workers is None else workers, len(shards))
    if workers == 0:
        for number, shard in shards.items():
            task(number, shard, lambda documents, size: None)
        return
    context = get_context("spawn")
    done = context.Array("q", 2)
    progress = _Progress(name, sum(shard.size for shard in shards.values()), log)
    pool = ProcessPoolExecutor(workers, context, _start, (task, done))
    try:
        sizes = {pool.submit(_work, *item): item[1].size for item in shards.items()}
        waiting = set(sizes)
        while waiting:
            finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
                progress.finished += sizes[future]
            progress.show(*done)
    except BrokenProcessPool:
        raise UserError(
            f"{name}: a worker was killed (out of memory?): type the same command again to go on "
            "from here, with fewer --workers."
        ) from None
    finally:
        progress.end()
        pool.shutdown(wait=True, cancel_futures=True)


def leave_with_parent() -> None:
    """End this process when its parent does.

    To be called in each process of a pool, which would otherwise wait for ever for a parent that
    was killed.
    """

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_task: Task
_done: Any


def _start(task: Task, done: Any) -> None:
    global _task, _done
    _task, _done = task, done
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    leave_with_parent()


def _work(number: int, shard: Shard) -> None:
    _task(number, shard, _count)


def _count(documents: int, size: int) -> None:
    with _done.get_lock():
        _done[0] += documents
        _done[1] += size


class _Progress:
    """One line: rewritten in place on a terminal, every ten seconds elsewhere."""

    def __init__(self, name: str, total: int, log: Callable[[str], None]) -> None:
        self.name, self.total, self.log = name, total, log
        self.finished = 0
        self.terminal = sys.stderr.isatty()
        self.started = self.shown = time.monotonic()

    def show(self, documents: int, size: int) -> None:
        """Tell the documents and the bytes of text so far, and the share of the input read."""
        now = time.monotonic()
        if not self.terminal and now - self.shown < 10:
            return
        self.shown, seconds = now, max(now - self.started, 1e-9)
        share = self.finished / max(self.total, 1)
        line = (
            f"{self.name}: {documents:,} documents, {documents / seconds:,.0f} documents/s, "
            f"{size / seconds / 1e6:.1f} MB/s, {share:.0%} of the input"
        )
        if self.terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        else:
            self.log(line)

    def end(self) -> None:
        """Clear the line."""
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
