"""Finite sets of documents, packed into rows that are read by position.

An *item* is what must stay in one row: a conversation, or the two answers of a preference pair. Its
documents are isolated from each other and from their neighbours, as everywhere.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smol.data.batch import IGNORE, TokenBatch
from smol.data.chat import Rendered
from smol.data.curriculum import Samples
from smol.data.packing import pack

FLAT = {"tokens": np.int32, "trained": np.bool_}
OFFSETS = ("documents", "items", "targets")
META = "items.json"


@dataclass(frozen=True)
class Items:
    """Items, one after the other in flat arrays.

    Attributes:
        tokens: ``(tokens,)`` int32.
        trained: ``(tokens,)`` bool, whether a token is a target; the first of a document never is.
        documents: First token of each document, and the end; ``(documents + 1,)`` int64.
        items: First document of each item, and the end; ``(items + 1,)`` int64.
        targets: Targets of each item; ``(items,)`` int64.
        digest: SHA-256 of the arrays.
        notes: What was noted when they were written.
        folder: Where they lie.
    """

    tokens: np.ndarray
    trained: np.ndarray
    documents: np.ndarray
    items: np.ndarray
    targets: np.ndarray
    digest: str
    notes: dict[str, Any]
    folder: Path

    def __len__(self) -> int:
        return len(self.targets)

    def __reduce__(self) -> tuple:
        return open_items, (self.folder,)  # memory maps do not travel to data workers

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each item; ``(items,)`` int64."""
        return np.diff(self.documents[self.items])

    def item(self, number: int) -> list[Rendered]:
        """The documents of an item."""
        first, end = self.items[number : number + 2]
        bounds = self.documents[first : end + 1].tolist()
        return [Rendered(self.tokens[a:b], self.trained[a:b]) for a, b in pairwise(bounds)]


def write_items(
    folder: Path, items: Iterable[Sequence[Rendered]], notes: dict[str, Any] | None = None
) -> None:
    """Write items to a folder, which appears whole; a folder that is there is left as it is.

    Args:
        folder: Where :func:`open_items` will find them.
        items: The documents of each item.
        notes: Kept with the items, as it is when the last of them is written. JSON-compatible.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    documents, firsts, targets = [0], [0], []
    digest = hashlib.sha256()
    try:
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(part / name, "wb")) for name in FLAT}
            for item in items:
                targets.append(0)
                for document in item:
                    trained = document.trained.copy()
                    trained[:1] = False  # nothing precedes it
                    arrays = {"tokens": document.tokens, "trained": trained}
                    for name, dtype in FLAT.items():
                        data = np.ascontiguousarray(arrays[name], dtype).tobytes()
                        files[name].write(data)
                        digest.update(data)
                    documents.append(documents[-1] + len(document.tokens))
                    targets[-1] += int(trained.sum())
                firsts.append(len(documents) - 1)
        for name, numbers in zip(OFFSETS, (documents, firsts, targets), strict=True):
            array = np.array(numbers, np.int64)
            np.save(part / f"{name}.npy", array)
            digest.update(array.tobytes())
        (part / META).write_text(json.dumps({"digest": digest.hexdigest(), "notes": notes or {}}))
        part.chmod(0o755)
        if not (folder / META).exists():
            os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def open_items(folder: Path) -> Items:
    """Open what :func:`write_items` has written; the tokens stay on disk until they are read."""
    offsets = {name: np.load(folder / f"{name}.npy") for name in OFFSETS}
    size = int(offsets["documents"][-1])
    flat = {
        name: np.memmap(folder / name, dtype, mode="r", shape=(size,))
        if size
        else np.empty(0, dtype)
        for name, dtype in FLAT.items()
    }
    meta = json.loads((folder / META).read_text())
    return Items(**flat, **offsets, **meta, folder=folder)


@dataclass
class PackedBatch(TokenBatch):
    """A :class:`TokenBatch` that knows its items.

    Where every item has ``d`` documents, those of document number ``k`` of a row belong to item
    ``items[row, k // d]``. What is left of a row is a document of padding without targets.

    Attributes:
        items: Numbers of the items of each row, ``(rows, most)`` int64; -1 where there is none.
    """

    items: Tensor | None = None


class PackedRows:
    """Rows of packed items; implements :class:`smol.data.loader.Rows`.

    Items are numbered through all sets. A row is the block of ``context`` tokens that begins at
    ``row * context`` of a source with one chunk, so that a curriculum orders rows like any blocks.

    Args:
        sets: Items by the number of their set.
        chosen: Numbers of the items that are read; one may be there twice. ``(chosen,)`` int64.
        context: Tokens of a row.
        pad_id: The token that fills a row up.

    Raises:
        ValueError: an item is longer than a row.
    """

    def __init__(self, sets: Sequence[Items], chosen: np.ndarray, context: int, pad_id: int):
        self.sets, self.chosen, self.context, self.pad_id = list(sets), chosen, context, pad_id
        self._firsts = np.cumsum([0, *map(len, sets)])
        self.lengths = np.concatenate([items.lengths for items in sets])
        self.targets = np.concatenate([items.targets for items in sets])
        self.packing = pack(self.lengths[chosen], context)
        self.row_targets = self._by_row(self.targets[chosen])

    def _by_row(self, numbers: np.ndarray) -> np.ndarray:
        """Sum a number of each chosen item over the rows."""
        return np.add.reduceat(numbers[self.packing.order], self.packing.starts[:-1])

    def __len__(self) -> int:
        return len(self.packing)

    @property
    def source_tokens(self) -> int:
        """Length of the chunk that the rows stand for, in tokens."""
        return len(self) * self.context + 1

    @property
    def fill(self) -> float:
        """Share of all rows that is not padding."""
        return float(self.lengths[self.chosen].sum()) / (len(self) * self.context)

    def set_of(self, item: int | np.ndarray) -> np.ndarray:
        """The set that an item belongs to."""
        return np.searchsorted(self._firsts, item, side="right") - 1

    def items_of(self, row: int) -> np.ndarray:
        """Numbers of the items of a row, in its order; int64."""
        return self.chosen[self.packing[row]]

    @cached_property
    def tokens_by_set(self) -> np.ndarray:
        """Tokens of each set in each row, padding left out; ``(rows, sets)`` int64."""
        sets, lengths = self.set_of(self.chosen), self.lengths[self.chosen]
        return np.stack([self._by_row(lengths * (sets == i)) for i in range(len(self.sets))], 1)

    def documents_of(self, item: int) -> list[Rendered]:
        """The documents of an item."""
        number = int(self.set_of(item))
        return self.sets[number].item(item - int(self._firsts[number]))

    def read(self, samples: Samples, mine: slice) -> PackedBatch:
        """Rows of an optimiser step, see :class:`smol.data.loader.Rows`."""
        rows = samples.start // self.context
        batch = self.batch(rows[mine])
        batch.step_tokens = int(self.row_targets[rows].sum())
        return batch

    def batch(self, rows: Sequence[int] | np.ndarray) -> PackedBatch:
        """Rows by their numbers. Their source is the set of their first item."""
        items = [self.items_of(row) for row in rows]
        table = np.full((len(items), max(map(len, items))), -1, np.int64)
        for row, numbers in zip(table, items, strict=True):
            row[: len(numbers)] = numbers
        columns = zip(*map(self._row, items), strict=True)
        tokens, targets, documents, positions = (torch.from_numpy(np.stack(c)) for c in columns)
        return PackedBatch(
            tokens=tokens,
            targets=targets,
            documents=documents,
            positions=positions,
            sources=torch.from_numpy(self.set_of(table[:, 0])),
            exact=False,
            items=torch.from_numpy(table),
        )

    def _row(self, items: np.ndarray) -> tuple[np.ndarray, ...]:
        """Tokens, targets, documents and positions of a row, ``(context,)`` each."""
        tokens = np.full(self.context, self.pad_id, np.int64)
        targets = np.full(self.context, IGNORE, np.int64)
        documents = np.zeros(self.context, np.int32)
        positions = np.arange(self.context, dtype=np.int64)
        at = 0
        for number, document in enumerate(
            document for item in items.tolist() for document in self.documents_of(item)
        ):
            end = at + len(document.tokens)
            tokens[at:end] = document.tokens
            predicted = np.where(document.trained[1:], document.tokens[1:], IGNORE)
            targets[at : end - 1] = predicted
            documents[at:] = number
            positions[at:] -= positions[at]
            at = end
        documents[at:] += int(0 < at < self.context)
        positions[at:] = np.arange(self.context - at)
        return tokens, targets, documents, positions
