"""The first part of a run's data, read apart from the run, and whether it is sound."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from smol.data.batch import IGNORE, TokenBatch
from smol.data.curriculum import Curriculum
from smol.data.loader import PositionLoader
from smol.errors import UserError


class TrialData:
    """Micro-batches of this process by optimiser step, from a loader of its own.

    Args:
        loader: Gives the micro-batches of ``keys`` in order.
        keys: For each optimiser step what its micro-batches are read by.
        different: How many of the steps differ; the others repeat them.
    """

    def __init__(self, loader: DataLoader, keys: list[list[Any]], different: int):
        self._loader, self._keys, self.different = loader, keys, different

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[list[Any]]:
        batches = iter(self._loader)
        for keys in self._keys:
            yield [next(batches) for _ in keys]

    def differs(self, step: int, micro_batches: list[Any]) -> bool:
        """Whether the data of a step, read once more and in this process, are not the same.

        Samples of others may be random, and are not compared.
        """
        if self._loader.batch_sampler is not None:
            return False
        again = [self._loader.dataset[key] for key in self._keys[step]]
        pairs = zip(map(_tensors, micro_batches), map(_tensors, again), strict=True)
        return not all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


def open_trial_data(trainer: Trainer, steps: int, share: float) -> TrialData:
    """The data of so many optimiser steps, from the first ``share`` of the run's, again and again.

    The share is at least one optimiser step. A ``PositionLoader`` is read at the positions that the
    run will read; of another loader's dataset the first samples are, in their order.

    Raises:
        UserError: The training data cannot be read twice.
    """
    loader = getattr(trainer.datamodule, "loader", None)
    if isinstance(loader, PositionLoader):
        return _by_position(loader, trainer.max_steps, steps, share)
    return _by_sample(trainer, steps, share)


def _by_position(loader: PositionLoader, max_steps: int, steps: int, share: float) -> TrialData:
    positions = _first_positions(loader.curriculum, loader.position, max_steps, steps, share)
    keys = [
        [(position, micro) for micro in range(_accumulation(loader, position))]
        for position in (positions[step % len(positions)] for step in range(steps))
    ]
    return TrialData(loader.read(list(chain.from_iterable(keys))), keys, len(positions))


def _accumulation(loader: PositionLoader, position: int) -> int:
    return loader.layout.accumulation(loader.curriculum.segment(position))


def _first_positions(
    curriculum: Curriculum, start: int, max_steps: int, steps: int, share: float
) -> list[int]:
    """Where the optimiser steps of the share begin, at most ``steps``."""
    end = curriculum.position_of_step(max_steps) if max_steps > 0 else math.inf
    stop = start + share * (end - start)
    positions, position = [start], start + curriculum.segment(start).global_batch
    while len(positions) < steps:
        following = position + curriculum.segment(position).global_batch
        if following > stop:
            break
        positions.append(position)
        position = following
    return positions


def _by_sample(trainer: Trainer, steps: int, share: float) -> TrialData:
    loader = trainer.train_dataloader
    size = getattr(loader, "batch_size", None)
    samples = getattr(loader, "dataset", None)
    if size is None or isinstance(samples, IterableDataset) or not hasattr(samples, "__len__"):
        raise UserError(
            f"WarmupCheck reads training data twice, which {type(loader).__name__} does not allow: "
            "expected a DataLoader with batch_size over a dataset with a length; go without it "
            "with --callbacks.warmup_check null"
        )
    sharing = trainer.distributed_sampler_kwargs or {}
    ranks, rank = sharing.get("num_replicas", 1), sharing.get("rank", 0)
    micros = trainer.accumulate_grad_batches
    step_samples = size * ranks * micros
    different = min(steps, max(1, int(len(samples) * share) // step_samples))
    keys = []
    for step in range(steps):
        first = step % different * step_samples
        starts = [first + (micro * ranks + rank) * size for micro in range(micros)]
        keys.append([[i % len(samples) for i in range(s, s + size)] for s in starts])
    apart = DataLoader(
        samples,
        batch_sampler=list(chain.from_iterable(keys)),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )
    return TrialData(apart, keys, different)


# -- what batches must be ------------------------------------------------------------------------


def find_fault(batch: Any, vocab_size: int | None) -> str | None:
    """What is wrong with a micro-batch, the first thing found; of other kinds whether it is finite.

    Args:
        batch: As the loader made it.
        vocab_size: How many tokens there are, if that is known.
    """
    if not isinstance(batch, TokenBatch):
        floats = [t for t in _tensors(batch) if t.is_floating_point()]
        return None if all(bool(t.isfinite().all()) for t in floats) else "not finite"
    tokens, targets = batch.tokens, batch.targets
    known = targets != IGNORE
    largest = math.inf if vocab_size is None else vocab_size - 1
    for name, ids in {"token": tokens, "target": targets[known]}.items():
        outside = ids[(ids < 0) | (ids > largest)]
        if outside.numel():
            return f"{name} {int(outside[0])} is not in the vocabulary of {vocab_size}"
    if (known[:, :-1] & (targets[:, :-1] != tokens[:, 1:])).any():
        return "a target is not the token that follows"
    same = batch.documents.diff(dim=1) == 0
    expected = torch.where(same, batch.positions[:, :-1] + 1, 0)
    if (batch.positions[:, 0] != 0).any() or (batch.positions[:, 1:] != expected).any():
        return "positions do not count from the beginning of each document"
    return None


def vocab_size_of(trainer: Trainer, pl_module: LightningModule) -> int | None:
    """How many tokens the data may have: the tokenizer's, else the model's rows."""
    tokenizer = getattr(trainer.datamodule, "tokenizer", None)
    decoder = getattr(pl_module, "decoder_config", None)
    return getattr(tokenizer, "vocab_size", getattr(decoder, "vocab_size", None))


def fingerprints(batch: Any) -> np.ndarray:
    """A number for each row of tokens, or one for a batch of something else; uint64."""
    rows = list(batch.tokens) if isinstance(batch, TokenBatch) else [_tensors(batch)]
    return np.array([_fingerprint(row) for row in rows], dtype=np.uint64)


def _fingerprint(tree: Any) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in _tensors(tree):
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return int.from_bytes(digest.digest(), "little")


def count_tokens(batch: Any) -> int:
    """Tokens of a micro-batch, 0 if it is of something else."""
    return batch.tokens.numel() if isinstance(batch, TokenBatch) else 0


def shared_rows(rows: list[np.ndarray]) -> float:
    """The largest share of a process' rows that another process has too.

    Args:
        rows: Fingerprints of the rows of one optimiser step, by process.
    """
    owners = Counter(number for own in rows for number in set(own.tolist()))
    shares = [np.mean([owners[n] > 1 for n in own.tolist()]) for own in rows if own.size]
    return float(max(shares, default=0.0))


def _tensors(tree: Any) -> list[Tensor]:
    leaves = vars(tree).values() if isinstance(tree, TokenBatch) else tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
