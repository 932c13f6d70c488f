"""What LightningDataModules of chats share: the template, and documents that are made once."""

import hashlib
import json
import sys
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from smol.data.chat import (
    FILE,
    ChatTemplate,
    Rendered,
    day_of,
    default_template,
    load_chat_template,
    save_chat_tokenizer,
)
from smol.data.conversation_tokens import Rendering
from smol.data.packed import open_items, write_items
from smol.data.packed_data import PackedData, choose
from smol.data.records import Records
from smol.errors import UserError
from smol.paths import resolve


class ChatData(PackedData):
    """Subsets of records that a chat template makes documents of.

    They are tokenised once and kept on disk, under another name whenever anything that shapes them
    is another. The run's folder receives the tokenizer with its chat template.

    Args:
        subsets: By name, dataclasses with at least ``path``, ``weight`` and ``held_out``.
        chat_template: A Jinja file or a folder with one; by default the tokenizer's, else the
            project's own.
        date: Today for the template, as ``2025-07-01``.
        bare: Leave out the template's block of metadata.
        packed: Arguments of :class:`~smol.data.packed_data.PackedData`.
    """

    def __init__(
        self,
        subsets: Mapping[str, Any],
        chat_template: str | None,
        date: str | None,
        bare: bool,
        **packed: Any,
    ):
        super().__init__(**packed)
        if date is not None:
            day_of(date)
        self.subsets = {name: s for name, s in subsets.items() if s is not None and s.weight != 0}
        self.chat_template_path, self.date, self.bare = chat_template, date, bare

    @abstractmethod
    def ensure_embedded(self) -> None:
        """Make what is missing of the embedded corpora."""

    @abstractmethod
    def rendering(self) -> Rendering:
        """How records become documents."""

    @abstractmethod
    def documents(
        self, config: Any, rendering: Rendering, held_out: bool, notes: dict[str, Any]
    ) -> Iterable[Sequence[Rendered]]:
        """Items of one side of a subset; what is worth telling goes into ``notes``."""

    @abstractmethod
    def balance(self) -> Iterator[str]:
        """Lines of a table: what each subset and each mode amounts to, weights applied."""

    @abstractmethod
    def example(self, colour: bool) -> str:
        """One item, decoded; what is trained on is marked, by colour or by «quotes»."""

    def prepare_data(self) -> None:
        """Make what is missing of the embedded corpora, and tokenise (one process per machine)."""
        self.ensure_embedded()
        rendering = self.rendering()
        for name, config in self.subsets.items():
            for held_out in (False, True):
                folder = self._folder(name, rendering, held_out)
                if not folder.exists():
                    notes: dict[str, Any] = {}
                    items = self.documents(config, rendering, held_out, notes)
                    write_items(folder, items, notes)

    def setup(self, stage: str | None = None) -> None:
        """Open the tokenised documents and pack them; say what they are."""
        if self.rows is not None:
            return
        rendering, names = self.rendering(), sorted(self.subsets)
        sets, held_out = (
            [open_items(self._folder(name, rendering, side)) for name in names]
            for side in (False, True)
        )
        first, chosen = 0, [np.empty(0, np.int64)]
        for name, items in zip(names, sets, strict=True):
            own = choose(len(items), self.subsets[name].weight, self.seed, crc32(name.encode()))
            chosen.append(first + own)
            first += len(items)
        for name, items in zip(names, held_out, strict=True):
            if (wanted := self.subsets[name].held_out) and not len(items):
                rank_zero_warn(
                    f"nothing of '{name}' is held out, though held_out is {wanted}: there are no "
                    f"such records, or all are longer than a row of {self.context_length:,} tokens"
                )
        self.use(names, sets, np.concatenate(chosen), held_out)
        if stage in (None, "fit"):
            for line in self.balance():
                rank_zero_info(line)
            rank_zero_info(self.example(sys.stderr.isatty()))
            if self.trainer is not None and self.trainer.is_global_zero:
                folder = Path(self.trainer.default_root_dir, "tokenizer")
                used = {"date": rendering.date, "bare": rendering.bare}
                save_chat_tokenizer(rendering.template, folder, **used)

    def chat_template(self) -> ChatTemplate:
        """The template of the run.

        Raises:
            UserError: there is none, or it does not say what the assistant writes.
        """
        tokenizer = self.load_tokenizer()
        if self.chat_template_path is not None:
            path = Path(resolve(self.chat_template_path))
            template = (
                ChatTemplate(tokenizer, path.read_text(encoding="utf-8"))
                if path.is_file()
                else load_chat_template(path, tokenizer)
            )
            if template is None:
                raise UserError(f"data.chat_template is {path}, expected a Jinja file or a {FILE}")
        else:
            template = load_chat_template(resolve(self.tokenizer_path), tokenizer)
            template = template or default_template(tokenizer)
        if not template.marks_answers:
            raise UserError(
                "the chat template has no {% generation %} blocks, so it does not say what to "
                "train on; add them, or use the project's own with data.chat_template "
                f"src/smol/data/{FILE}"
            )
        return template

    def _folder(self, name: str, rendering: Rendering, held_out: bool) -> Path:
        """Where a side of a subset is kept; another folder whenever anything of it is another."""
        config = self.subsets[name]
        inputs = [Records(config.path).inputs()]
        if isinstance(config.held_out, str):
            inputs.append(Records(config.held_out).inputs())
        columns = asdict(config) | {"weight": None, "provenance": None}
        key = json.dumps([inputs, columns, rendering.settings(), held_out], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        return Path(resolve(self.cache_dir)) / "conversations" / f"{name}-{digest}"
