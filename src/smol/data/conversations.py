"""The LightningDataModule of mid-training and supervised fine-tuning."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from smol.data.chat import Rendered
from smol.data.chat_data import ChatData
from smol.data.conversation_tokens import Rendering, check_subsets, documents
from smol.data.messages import SubsetConfig
from smol.data.tokenizer import Tokenizer
from smol.errors import UserError, nearest
from smol.paths import resolve

GREEN, DIM, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
EXAMPLE_TOKENS = 400


class Conversations(ChatData):
    """Conversations, packed into rows in which they do not see each other.

    Trained on is what the assistant says, the token that ends its turn included. The run's folder
    receives the tokenizer with its chat template.

    Args:
        subsets: Sets of conversations by name; ``null`` removes one.
        tokenizer: Folder with the ``tokenizer.json``.
        context_length: Tokens of a row.
        global_batch_tokens: Tokens of rows per optimiser step.
        micro_batch_tokens: Tokens of one forward and backward pass of one process.
        chat_template: A Jinja file or a folder with one; by default the tokenizer's, else the
            project's own.
        train_on: ``assistant``, or ``all`` tokens.
        long: What becomes of conversations longer than a row: ``drop`` or ``split``.
        date: Today for the template, as ``2025-07-01``.
        bare: Leave out the template's block of metadata.
        embedded: Folder of the embedded corpora; tokenizer and conversations are made when missing.
            ``null`` if no subset needs them.
        embedded_vocab_size: Vocabulary of the tokenizer that is trained with them.
        seed: Seed of the order, and of which conversations a weight below 1 takes.
        num_workers: Processes that read ahead.
        held_out_tokens: Tokens of each subset's held-out conversations that validation reads.
        cache_dir: Where tokenised conversations are kept.
        allow_changed_data: Go on although the conversations have changed.
    """

    def __init__(
        self,
        subsets: dict[str, SubsetConfig | None],
        tokenizer: str,
        context_length: int,
        global_batch_tokens: int,
        micro_batch_tokens: int,
        chat_template: str | None = None,
        train_on: str = "assistant",
        long: str = "drop",
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
        for key, value, known in (
            ("train_on", train_on, ("assistant", "all")),
            ("long", long, ("drop", "split")),
        ):
            if value not in known:
                hint = nearest(value, known)
                raise UserError(f"data.{key} is {value!r}, expected {' or '.join(known)}.{hint}")
        check_subsets(self.subsets)
        self.train_on, self.long = train_on, long
        self.embedded, self.embedded_vocab_size = embedded, embedded_vocab_size

    def ensure_embedded(self) -> None:
        if self.embedded is not None:
            from smol.data.corpora import ensure_embedded
            from smol.data.corpora.chat import ensure_chat

            folder = Path(resolve(self.embedded))
            ensure_embedded(folder, self.embedded_vocab_size, log=rank_zero_info, paths=())
            ensure_chat(folder, log=rank_zero_info)

    def rendering(self) -> Rendering:
        template = self.chat_template()
        return Rendering(
            template, self.context_length, self.train_on, self.long, self.date, self.bare
        )

    def documents(
        self, config: SubsetConfig, rendering: Rendering, held_out: bool, notes: dict[str, Any]
    ) -> Iterator[list[Rendered]]:
        return documents(config, rendering, held_out, notes)

    def balance(self) -> Iterator[str]:
        """Lines of a table: what each subset and each mode amounts to, weights applied."""
        read = [self.rows.set_of(self.rows.chosen) == i for i in range(len(self.source_names))]
        tokens = self.rows.lengths[self.rows.chosen]
        targets = self.rows.targets[self.rows.chosen]
        modes: dict[str, float] = {}
        total = int(targets.sum())
        yield f"{'subset':<28} {'documents':>10} {'tokens':>13} {'trained':>13} {'share':>6}  mode"
        for name, mine, items in zip(self.source_names, read, self.rows.sets, strict=True):
            notes, trained = items.notes, int(targets[mine].sum())
            whole = sum(notes["modes"].values())
            shares = {mode: count / whole for mode, count in notes["modes"].items() if whole}
            for mode, share in shares.items():
                modes[mode] = modes.get(mode, 0.0) + share * trained
            shown = ", ".join(f"{mode} {share:.0%}" for mode, share in sorted(shares.items()))
            line = f"{name:<28} {mine.sum():>10,} {tokens[mine].sum():>13,} {trained:>13,}"
            line += f" {trained / total:>6.1%}  {shown}"
            for what in ("dropped", "split"):
                if notes[what]:
                    line += f"; {notes[what]:,} longer than a row {what}"
            yield line
        by_mode = ", ".join(f"{mode} {n / total:.1%}" for mode, n in sorted(modes.items()))
        line = f"{'all':<28} {len(tokens):>10,} {tokens.sum():>13,} {total:>13,}"
        yield f"{line} {1:>6.1%}  {by_mode}"

    def example(self, colour: bool) -> str:
        """The first conversation of the last row, decoded; what is trained on is marked.

        Args:
            colour: Mark by colour, not by «quotes».
        """
        (document,) = self.rows.documents_of(int(self.rows.items_of(len(self.rows) - 1)[0]))
        return show_document(self.tokenizer, document, colour)


def show_document(tokenizer: Tokenizer, document: Rendered, colour: bool) -> str:
    """A document as text, what is trained on in colour or in «quotes»."""
    begin, end = (GREEN, PLAIN) if colour else ("«", "»")
    pairs = zip(document.tokens[:EXAMPLE_TOKENS], document.trained[:EXAMPLE_TOKENS], strict=True)
    shown = ""
    for trained, run in groupby(pairs, key=lambda pair: bool(pair[1])):
        text = tokenizer.decode(token for token, _ in run)
        if trained:
            shown += f"{begin}{text}{end}"
        else:
            shown += f"{DIM}{text}{PLAIN}" if colour else text
    rest = len(document.tokens) - EXAMPLE_TOKENS
    return shown + (f" … {rest:,} tokens more" if rest > 0 else "")
