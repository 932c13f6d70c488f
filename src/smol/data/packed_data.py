"""What LightningDataModules over packed items share: conversations, preference pairs."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from smol.data.batch import IGNORE
from smol.data.chat import PAD
from smol.data.curriculum import Curriculum
from smol.data.loader import Layout, RowLoader
from smol.data.packed import Items, PackedBatch, PackedRows
from smol.data.positioned import PositionedData
from smol.data.pretraining import EPOCHS_TO_WARN
from smol.data.spans import Leg, SourceOrder, shuffled
from smol.data.stages import Segment, SourceConfig, StageConfig, check_positive, plan
from smol.data.tokenizer import Tokenizer, load_tokenizer
from smol.errors import UserError
from smol.paths import resolve

SOURCE = "items"


class PackedData(PositionedData):
    """Finite sets of items, packed over the whole set and read for as many epochs as asked.

    The position counts tokens of whole rows, padding included; each epoch has an order of its own.
    A subclass calls :meth:`use` in its ``setup``.

    Args:
        tokenizer: Folder with the ``tokenizer.json``.
        context_length: Tokens of a row.
        global_batch_tokens: Tokens of rows per optimiser step.
        micro_batch_tokens: Tokens of one forward and backward pass of one process.
        seed: Seed of the order.
        num_workers: Processes that read ahead.
        held_out_tokens: Tokens of each set's held-out items that validation reads; ``test`` reads
            all of them.
        cache_dir: Where tokenised items are kept.
        allow_changed_data: Go on although the data have changed; the new ones are read from their
            beginning.
    """

    def __init__(
        self,
        tokenizer: str,
        context_length: int,
        global_batch_tokens: int,
        micro_batch_tokens: int,
        seed: int = 6,
        num_workers: int = 0,
        held_out_tokens: int = 2**17,
        cache_dir: str = "data/cache",
        allow_changed_data: bool = False,
    ):
        super().__init__()
        for key, number in {
            "context_length": context_length,
            "global_batch_tokens": global_batch_tokens,
            "micro_batch_tokens": micro_batch_tokens,
        }.items():
            check_positive(f"data.{key}", number)
        if context_length == 1:
            raise UserError(
                "data.context_length is 1, expected at least 2: a token and the one to predict"
            )
        if seed < 0 or num_workers < 0:
            raise UserError(
                f"data.seed is {seed}, data.num_workers is {num_workers}; expected 0 or more"
            )
        self.tokenizer_path, self.cache_dir = tokenizer, cache_dir
        self.context_length, self.global_batch_tokens = context_length, global_batch_tokens
        self.micro_batch_tokens, self.held_out_tokens = micro_batch_tokens, held_out_tokens
        self.seed, self.num_workers = seed, num_workers
        self.allow_changed_data = allow_changed_data
        self.tokenizer: Tokenizer | None = None
        self.rows: PackedRows | None = None
        self._held_out: Sequence[Items] = ()

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer, from the first call on."""
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(resolve(self.tokenizer_path))
        return self.tokenizer

    def use(
        self,
        names: Sequence[str],
        sets: Sequence[Items],
        chosen: np.ndarray,
        held_out: Sequence[Items],
    ) -> None:
        """Pack what is to be read.

        Args:
            names: Of the sets.
            sets: Items of each set.
            chosen: Numbers of the items to train on, counted through all sets.
            held_out: Held-out items of each set; may be empty.

        Raises:
            UserError: there is nothing to train on.
        """
        if not len(chosen):
            raise UserError(
                f"there is nothing to train on in {', '.join(names) or 'no set at all'}"
            )
        self.source_names = tuple(names)
        pad_id = self.tokenizer.backend.token_to_id(PAD)
        self._pad_id = self.tokenizer.eos_id if pad_id is None else pad_id
        self.rows = PackedRows(sets, chosen, self.context_length, self._pad_id)
        self._held_out = held_out
        digest = hashlib.sha256(chosen.tobytes())
        for items in sets:
            digest.update(items.digest.encode())
        self._digest = digest.hexdigest()

    @property
    def digests(self) -> dict[str, str]:
        return {SOURCE: self._digest}

    def order_settings(self) -> dict[str, int]:
        return {"data.seed": self.seed, "data.context_length": self.context_length}

    # -- training --------------------------------------------------------------------------------

    @property
    def _order(self) -> SourceOrder:
        context = self.context_length
        return SourceOrder(SOURCE, [self.rows.source_tokens], context, context, 1, self.seed)

    def build_curriculum(self, history: tuple[Segment, ...] = ()) -> Curriculum:
        """One stage over the rows."""
        stage = {"packed": StageConfig({SOURCE: SourceConfig("", 1.0)}, start_step=0)}
        context, batch = self.context_length, self.global_batch_tokens
        segments = plan(stage, self.digests, context, batch, history)
        return Curriculum(segments, {SOURCE: self._order}, self.digests)

    def build_loader(self, curriculum: Curriculum) -> RowLoader:
        return RowLoader(curriculum, self.rows, self.layout(), self.num_workers)

    def ledger(self) -> dict[str, float]:
        """Tokens and epochs of each set so far, padding left out, as metrics."""
        read = sum(
            segment.stop - segment.start
            for segment in self.loader.curriculum.history(self.loader.position)
            if segment.digests == self.digests
        )
        tokens = self._tokens_of(read // self.context_length)
        per_epoch = self.rows.tokens_by_set.sum(0)
        counted = [(n, t, e) for n, t, e in zip(self.source_names, tokens, per_epoch, strict=True)]
        return {f"data/tokens/{name}": float(n) for name, n, _ in counted} | {
            f"data/epochs/{name}": float(n / whole) for name, n, whole in counted if whole
        }

    def _tokens_of(self, rows: int) -> np.ndarray:
        """Tokens of each set in so many rows from the beginning; ``(sets,)`` int64."""
        epochs, rest = divmod(rows, len(self.rows))
        by_row = self.rows.tokens_by_set
        first = epochs * len(self.rows)
        _, starts = Leg(self._order, self.context_length).read(np.arange(first, first + rest))
        return epochs * by_row.sum(0) + by_row[starts // self.context_length].sum(0)

    def announce(self, curriculum: Curriculum) -> None:
        rows, steps = self.rows, self.trainer.max_steps if self.trainer else -1
        per_step = self.global_batch_tokens // self.context_length
        line = (
            f"data: {len(rows.chosen):,} items in {len(rows):,} rows of {self.context_length:,} "
            f"tokens, {rows.fill:.1%} full; an epoch is {len(rows) / per_step:,.1f} steps"
        )
        if steps >= 0:
            epochs = curriculum.position_of_step(steps) / (rows.source_tokens - 1)
            line += f", the run {steps:,} steps or {epochs:.2f} epochs"
            if epochs > EPOCHS_TO_WARN:
                rank_zero_warn(
                    f"the data will be read {epochs:.1f} times; more than {EPOCHS_TO_WARN} "
                    "repetitions are reported to stop helping",
                    category=UserWarning,
                )
        rank_zero_info(line)

    # -- evaluation ------------------------------------------------------------------------------

    def val_dataloader(self) -> "HeldOutItems":
        """The first ``held_out_tokens`` of each set's held-out items."""
        return self._held_out_items(self.held_out_tokens)

    def test_dataloader(self) -> "HeldOutItems":
        """All held-out items."""
        return self._held_out_items(None)

    predict_dataloader = val_dataloader

    def _held_out_items(self, limit: int | None) -> "HeldOutItems":
        first, by_set = 0, []
        for items in self._held_out:
            upto = len(items)
            if limit is not None:
                upto = max(1, int(np.searchsorted(np.cumsum(items.lengths), limit, "right")))
            chosen = np.arange(first, first + min(upto, len(items)))
            first += len(items)
            if len(chosen):
                by_set.append(PackedRows(self._held_out, chosen, self.context_length, self._pad_id))
        return HeldOutItems(by_set, self.layout())


class HeldOutItems:
    """Batches of held-out rows, each of one set, dealt to the ranks in turn.

    Every rank gets equally many, since sharded models act together: the last ones may hold no
    target. It is no ``DataLoader``, which Lightning would deal out to the ranks once more.

    Args:
        sets: Rows of one set each.
        layout: This process's share.
    """

    def __init__(self, sets: Sequence[PackedRows], layout: Layout):
        self.layout = layout
        self._batches = [
            (rows, range(first, min(first + per_pass, len(rows))))
            for rows in sets
            for per_pass in [max(1, layout.micro_batch_tokens // rows.context)]
            for first in range(0, len(rows), per_pass)
        ]

    def __len__(self) -> int:
        return -(-len(self._batches) // self.layout.ranks)

    def __iter__(self) -> Iterator[PackedBatch]:
        return (self._batch(index) for index in range(len(self)))

    def _batch(self, index: int) -> PackedBatch:
        mine = index * self.layout.ranks + self.layout.rank
        padding = mine >= len(self._batches)
        rows, numbers = self._batches[0 if padding else mine]
        batch = rows.batch(numbers)
        if padding:
            batch.targets.fill_(IGNORE)
        return batch


def choose(count: int, weight: float, *key: int) -> np.ndarray:
    """Which items of a set are read: a random share, or all of them several times.

    Args:
        count: Items of the set.
        weight: How much of it: 0.5 is half of the items, 2 each of them twice.
        key: Seed.

    Returns:
        Their numbers, ascending; ``(round(weight * count),)`` int64.
    """
    return np.sort(np.resize(shuffled(count, *key), round(weight * count) if count else 0))
