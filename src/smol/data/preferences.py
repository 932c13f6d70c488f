"""The LightningDataModule of preference optimisation."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from smol.data.batch import IGNORE
from smol.data.chat import Rendered
from smol.data.chat_data import ChatData
from smol.data.conversation_tokens import Rendering, check_subsets
from smol.data.conversations import show_document
from smol.data.curriculum import Curriculum, Samples
from smol.data.loader import RowLoader
from smol.data.messages import SubsetConfig
from smol.data.packed import Items, PackedBatch, PackedRows
from smol.data.packed_data import HeldOutItems
from smol.data.pairs import PairsConfig, documents, left_out
from smol.errors import UserError, nearest
from smol.paths import resolve

SIDES = ("chosen", "rejected")


class Preferences(ChatData):
    """Pairs of a chosen and a rejected answer, packed into rows.

    Both answers stand in one row, each a document of its own after its own copy of the prompt. All
    pairs, those held out included, are numbered: ``PackedBatch.items`` are these numbers.

    Args:
        subsets: Sets of pairs by name; ``null`` removes one.
        tokenizer: Folder with the ``tokenizer.json``.
        context_length: Tokens of a row.
        global_batch_tokens: Tokens of rows per optimiser step; how many pairs that are differs.
        micro_batch_tokens: Tokens of one forward and backward pass of one process.
        max_length: Tokens of a prompt with an answer at most; by default half of a row.
        truncation: What becomes of pairs with a longer one: ``drop``, or ``cut`` the answer's end.
        chat_template: A Jinja file or a folder with one; by default the tokenizer's, else the
            project's own.
        date: Today for the template, as ``2025-07-01``.
        bare: Leave out the template's block of metadata.
        embedded: Folder of the embedded corpora; tokenizer and pairs are made when missing.
            ``null`` if no subset needs them.
        embedded_vocab_size: Vocabulary of the tokenizer that is trained with them.
        seed: Seed of the order, and of which pairs a weight below 1 takes.
        num_workers: Processes that read ahead.
        held_out_tokens: Tokens of each subset's held-out pairs that validation reads.
        cache_dir: Where tokenised pairs are kept.
        allow_changed_data: Go on although the pairs have changed.
    """

    def __init__(
        self,
        subsets: dict[str, PairsConfig | None],
        tokenizer: str,
        context_length: int,
        global_batch_tokens: int,
        micro_batch_tokens: int,
        max_length: int | None = None,
        truncation: str = "drop",
        chat_template: str | None = None,
        date: str | None = None,
        bare: bool = False,
        embedded: str | None = None,
        embedded_vocab_size: int = 4096,
        seed: int = 6,
        num_workers: int = 0,
        held_out_tokens: int = 2**17,
        cache_dir: str = "data/cache",
        allow_changed_data: bool = False,
    ):
        super().__init__(
            subsets,
            chat_template,
            date,
            bare,
            tokenizer=tokenizer,
            context_length=context_length,
            global_batch_tokens=global_batch_tokens,
            micro_batch_tokens=micro_batch_tokens,
            seed=seed,
            num_workers=num_workers,
            held_out_tokens=held_out_tokens,
            cache_dir=cache_dir,
            allow_changed_data=allow_changed_data,
        )
        check_subsets(
            {n: SubsetConfig(s.path, s.weight, s.mode, s.held_out) for n, s in self.subsets.items()}
        )
        if truncation not in (known := ("drop", "cut")):
            hint = nearest(truncation, known)
            raise UserError(f"data.truncation is {truncation!r}, expected drop or cut.{hint}")
        if max_length is not None and not 2 <= max_length <= context_length // 2:
            raise UserError(
                f"data.max_length is {max_length}, but a row of {context_length} tokens holds two "
                f"answers of {context_length // 2}; type --data.context_length {2 * max_length} or "
                "a smaller max_length"
            )
        self.max_length = max_length or context_length // 2
        self.truncation = truncation
        self.embedded, self.embedded_vocab_size = embedded, embedded_vocab_size

    # -- set-up ----------------------------------------------------------------------------------

    def ensure_embedded(self) -> None:
        if self.embedded is not None:
            from smol.data.corpora import ensure_embedded
            from smol.data.corpora.preferences import ensure_preferences

            folder = Path(resolve(self.embedded))
            ensure_embedded(folder, self.embedded_vocab_size, log=rank_zero_info, paths=())
            ensure_preferences(folder, log=rank_zero_info)

    def rendering(self) -> Rendering:
        return Rendering(
            self.chat_template(),
            self.max_length,
            long=self.truncation,
            date=self.date,
            bare=self.bare,
        )

    def documents(
        self, config: PairsConfig, rendering: Rendering, held_out: bool, notes: dict[str, Any]
    ) -> Iterable[Sequence[Rendered]]:
        return documents(config, rendering, held_out, notes)

    def setup(self, stage: str | None = None) -> None:
        """Open the tokenised pairs, number and pack them; say what they are."""
        super().setup(stage)
        self._all = (*self.rows.sets, *self._held_out)
        stop = self.chat_template().stop_id
        self.truncated = torch.from_numpy(np.concatenate([_truncated(s, stop) for s in self._all]))

    # -- all pairs -------------------------------------------------------------------------------

    @property
    def pairs_digest(self) -> str:
        """SHA-256 of the tokens of all pairs, of what is trained on in them, and of their order."""
        digests = [items.digest for items in self._all]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    @property
    def used(self) -> Tensor:
        """Whether a pair is trained on or held out; ``(pairs,)`` bool."""
        used = torch.zeros(sum(map(len, self._all)), dtype=torch.bool)
        used[torch.from_numpy(self.rows.chosen)] = True
        used[self._first_held_out :] = True
        return used

    @property
    def _first_held_out(self) -> int:
        return sum(map(len, self.rows.sets))

    def all_pairs(self) -> "PairBatches":
        """Batches of this rank that, with those of the others, hold each used pair once."""
        used = self.used.nonzero().squeeze(1).numpy()
        rows = PackedRows(self._all, used, self.context_length, self._pad_id)
        return PairBatches(HeldOutItems([rows], self.layout()), 0)

    # -- training and evaluation -----------------------------------------------------------------

    def build_loader(self, curriculum: Curriculum) -> RowLoader:
        return RowLoader(curriculum, PairRows(self.rows), self.layout(), self.num_workers)

    def val_dataloader(self) -> "PairBatches":
        """The first ``held_out_tokens`` of each set's held-out pairs."""
        return PairBatches(super().val_dataloader(), self._first_held_out)

    def test_dataloader(self) -> "PairBatches":
        """All held-out pairs."""
        return PairBatches(super().test_dataloader(), self._first_held_out)

    predict_dataloader = val_dataloader

    # -- what is said before the run -------------------------------------------------------------

    def balance(self) -> Iterator[str]:
        """Lines of a table: the pairs of each subset and mode, weights applied; mean lengths."""
        read = [(self.rows.set_of(self.rows.chosen) == i) for i in range(len(self.source_names))]
        yield f"{'subset':<28} {'pairs':>10} {'held out':>10} {'chosen':>8} {'rejected':>8}  mode"
        by_mode: dict[str, float] = {}
        sets = zip(self.source_names, read, self.rows.sets, self._held_out, strict=True)
        for name, mine, items, held_out in sets:
            modes, notes = items.notes["modes"], items.notes
            means = [sum(m[side] for m in modes.values()) / max(len(items), 1) for side in SIDES]
            shares = {mode: m["pairs"] / len(items) for mode, m in sorted(modes.items())}
            for mode, share in shares.items():
                by_mode[mode] = by_mode.get(mode, 0.0) + share * int(mine.sum())
            shown = ", ".join(f"{mode} {share:.0%}" for mode, share in shares.items())
            line = f"{name:<28} {mine.sum():>10,} {len(held_out):>10,} {means[0]:>8.1f} "
            line += f"{means[1]:>8.1f}  {shown}"
            if notes["cut"]:
                line += f"; {notes['cut']:,} cut to {self.max_length} tokens"
            if reasons := left_out(notes, self.max_length):
                line += f"; left out: {', '.join(reasons)}"
            yield line
        total = len(self.rows.chosen)
        by_mode = ", ".join(f"{mode} {n / total:.1%}" for mode, n in sorted(by_mode.items()))
        yield f"{'all':<28} {total:>10,} {sum(map(len, self._held_out)):>10,} {'':>17}  {by_mode}"

    def example(self, colour: bool) -> str:
        pair = self.rows.documents_of(int(self.rows.items_of(len(self.rows) - 1)[0]))
        shown = (show_document(self.tokenizer, document, colour) for document in pair)
        return "\n".join(f"{side}: {text}" for side, text in zip(SIDES, shown, strict=True))


def _truncated(pairs: Items, stop_id: int) -> np.ndarray:
    """Which pairs have an answer without its end; ``(pairs,)`` bool."""
    ends = pairs.tokens[pairs.documents[1:] - 1] != stop_id
    return ends.reshape(-1, 2).any(axis=1)


@dataclass(frozen=True)
class PairRows:
    """Rows of pairs; implements :class:`smol.data.loader.Rows`, and counts pairs for tokens."""

    rows: PackedRows

    def read(self, samples: Samples, mine: slice) -> PackedBatch:
        pairs = np.diff(self.rows.packing.starts)[samples.start // self.rows.context]
        return replace(self.rows.read(samples, mine), step_tokens=int(pairs.sum()), exact=True)


@dataclass(frozen=True)
class PairBatches:
    """Batches whose pairs are numbered from ``first`` on; a batch of padding has none."""

    batches: HeldOutItems
    first: int

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[PackedBatch]:
        for batch in self.batches:
            padding = (batch.items < 0) | (batch.targets == IGNORE).all()
            yield replace(batch, items=torch.where(padding, -1, batch.items + self.first))
