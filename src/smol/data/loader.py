"""The one owner of the position: batches by position, to any worker and any rank."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from smol.data.batch import TokenBatch, token_tensors
from smol.data.curriculum import Curriculum, Samples
from smol.data.stages import Segment
from smol.data.streams import TokenStream
from smol.errors import UserError

ENDLESS = 10**12  # micro-batches: one epoch that outlasts any run


@dataclass(frozen=True)
class Layout:
    """How a global batch is dealt out.

    Attributes:
        rank: This process among the data-parallel ones.
        ranks: How many data-parallel processes there are.
        micro_batch_tokens: Tokens of one forward and backward pass of one process, at most.
    """

    rank: int
    ranks: int
    micro_batch_tokens: int

    def rows(self, segment: Segment) -> int:
        """Sequences of one micro-batch, never more than this process has of a global batch.

        So a global batch may begin below ``micro_batch_tokens`` and grow beyond it.
        """
        share = segment.global_batch // segment.context // self.ranks
        return max(1, min(self.micro_batch_tokens // segment.context, share))

    def accumulation(self, segment: Segment) -> int:
        """Micro-batches of one process in an optimiser step.

        Raises:
            UserError: the global batch does not divide.
        """
        sequences, per_pass = (
            segment.global_batch // segment.context,
            self.rows(segment) * self.ranks,
        )
        if sequences % per_pass:
            fits = -(-sequences // per_pass) * per_pass * segment.context
            raise UserError(
                f"stage '{segment.stage}': a global batch of {segment.global_batch} tokens is "
                f"{sequences} sequences of {segment.context}, not a multiple of "
                f"{self.rows(segment)} (micro_batch_tokens {self.micro_batch_tokens}) x "
                f"{self.ranks} (data-parallel processes); use --data.global_batch_tokens {fits} "
                "or another micro_batch_tokens"
            )
        return sequences // per_pass


class Rows(Protocol):
    """What a loader reads its rows from; it travels to worker processes."""

    def read(self, samples: Samples, mine: slice) -> TokenBatch:
        """Rows of an optimiser step.

        Args:
            samples: All rows of the step.
            mine: Those that are wanted.

        Returns:
            The rows in this order, with ``step_tokens`` and ``exact`` of the whole step. Its place
            in the run is not filled in.
        """


class Blocks:
    """Blocks of token streams, in which every token is trained on.

    Args:
        streams: By the number of their source.
        eos_id: The token that stands after each document.
        document_masking: Whether documents are kept apart.
    """

    def __init__(self, streams: list[TokenStream], eos_id: int, document_masking: bool = True):
        self.streams, self.eos_id = streams, eos_id
        self.document_masking = document_masking

    def read(self, samples: Samples, mine: slice) -> TokenBatch:
        segment, source = samples.segment, samples.source[mine]
        places = zip(source, samples.chunk[mine], samples.start[mine], strict=True)
        blocks = [
            self.streams[source].read(chunk, start, segment.context + 1)
            for source, chunk, start in places
        ]
        return TokenBatch(
            **token_tensors(np.stack(blocks), self.eos_id, self.document_masking),
            sources=torch.from_numpy(source),
            step_tokens=segment.global_batch,
        )


class _MicroBatches(Dataset):
    """Micro-batches of one rank by (position of the optimiser step, number of the micro-batch)."""

    def __init__(self, curriculum: Curriculum, rows: Rows, layout: Layout):
        self.curriculum, self.rows, self.layout = curriculum, rows, layout

    def __getitem__(self, key: tuple[int, int]) -> TokenBatch:
        position, micro = key
        samples = self.curriculum.step_samples(position)
        segment, layout = samples.segment, self.layout
        rows = layout.rows(segment)
        first = (micro * layout.ranks + layout.rank) * rows
        return replace(
            self.rows.read(samples, slice(first, first + rows)),
            position=position,
            next_position=position + segment.global_batch,
            micro=micro,
            accumulation=layout.accumulation(segment),
            stage=segment.stage,
        )


class _FromPosition(Sampler):
    """Keys of all micro-batches from a position on."""

    def __init__(self, curriculum: Curriculum, layout: Layout, position: int):
        self.curriculum, self.layout, self.position = curriculum, layout, position

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position = self.position
        while True:
            segment = self.curriculum.segment(position)
            for micro in range(self.layout.accumulation(segment)):
                yield position, micro
            position += segment.global_batch


_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of a job that is to save


class _Workers(DataLoader):
    """A loader whose workers outlive a signal that is sent to every process of a job.

    What SIGTERM and SIGUSR1 ask for, a checkpoint, is for the process that trains, and to take the
    next step it needs its workers.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, worker_init_fn=_ignore_signals, **kwargs)

    def __iter__(self) -> Any:
        # Held back until a worker is able to ignore them: a process inherits what is blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for worker in getattr(batches, "_workers", ()):
            # By which they are ended at last, also at the end of this process.
            worker._popen.terminate = partial(_kill, worker._popen, id(batches))
        return batches


def _kill(worker: Any, batches: int) -> None:
    with suppress(ValueError):  # not watched any more
        # Else torch raises because a worker has died, before the next one is ended.
        _remove_worker_pids(batches)
    worker.kill()


def _ignore_signals(worker: int) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


class PositionLoader:
    """An endless, seekable iterable of :class:`TokenBatch`.

    ``position`` counts what was trained on, not what was fetched: it moves only when told so.

    Args:
        curriculum: What comes at which position.
        streams: Token streams by source.
        eos_id: The token that stands after each document.
        layout: This process's share of a global batch.
        num_workers: Processes that read ahead; 0 reads in this one.
        prefetch: Micro-batches that each worker reads ahead.
        document_masking: Whether documents are kept apart.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        streams: dict[str, TokenStream],
        eos_id: int,
        layout: Layout,
        num_workers: int = 0,
        prefetch: int = 4,
        document_masking: bool = True,
    ):
        rows = Blocks([streams[name] for name in curriculum.names], eos_id, document_masking)
        self._begin(curriculum, rows, layout, num_workers, prefetch)

    def _begin(
        self, curriculum: Curriculum, rows: Rows, layout: Layout, num_workers: int, prefetch: int
    ) -> None:
        self.curriculum, self.layout = curriculum, layout
        self.num_workers, self.prefetch = num_workers, prefetch
        self.position = 0
        self._dataset = _MicroBatches(curriculum, rows, layout)
        self._seeks = 0
        for segment in curriculum.segments:
            layout.accumulation(segment)

    def __len__(self) -> int:
        # Without a length Lightning fetches one batch ahead of the one it trains on.
        return ENDLESS

    @property
    def accumulation(self) -> int:
        """Micro-batches of this process in the next optimiser step."""
        return self.layout.accumulation(self.curriculum.segment(self.position))

    def consume(self, position: int) -> None:
        """An optimiser step ended at ``position``."""
        self.position = position

    def seek(self, position: int) -> None:
        """Go on from ``position``; what was read ahead is dropped.

        Raises:
            ValueError: it is not where an optimiser step begins.
        """
        segment = self.curriculum.segment(position)
        if (position - segment.start) % segment.global_batch:
            raise ValueError(f"position {position} is not the beginning of an optimiser step")
        self.position = position
        self._seeks += 1

    def replan(self, curriculum: Curriculum) -> None:
        """Go on from the same position with another plan of what comes next."""
        self.curriculum = self._dataset.curriculum = curriculum
        self.seek(self.position)

    def __iter__(self) -> Iterator[TokenBatch]:
        while True:
            seeks = self._seeks
            with closing(self._read()) as batches:
                for batch in batches:
                    if seeks != self._seeks:
                        break
                    yield batch

    def read(self, keys: Iterable[tuple[int, int]]) -> DataLoader:
        """Micro-batches by (position of the optimiser step, number), apart from what is trained on.

        They come by the plan as it is now, also if that changes before they are read.
        """
        return _Workers(
            copy(self._dataset),
            batch_size=None,
            sampler=keys,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
            # Otherwise each new iterator takes a number from those that the training draws from.
            generator=torch.Generator(),
        )

    def _read(self) -> Iterator[TokenBatch]:
        yield from self.read(_FromPosition(self.curriculum, self.layout, self.position))


class RowLoader(PositionLoader):
    """A :class:`PositionLoader` over rows of any other kind than blocks of token streams.

    Args:
        curriculum: What comes at which position.
        rows: Where it is read.
        layout: This process's share of a global batch.
        num_workers: Processes that read ahead; 0 reads in this one.
        prefetch: Micro-batches that each worker reads ahead.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        rows: Rows,
        layout: Layout,
        num_workers: int = 0,
        prefetch: int = 4,
    ):
        self._begin(curriculum, rows, layout, num_workers, prefetch)
