"""Records of jsonl and parquet files and of Hugging Face datasets, one dictionary each."""

import json
import zlib
from collections.abc import Iterator
from typing import Any

from smol.data.documents import Files, format_of
from smol.data.hub import HubDataset
from smol.errors import UserError, one_line
from smol.paths import resolve

HUB = "hub:"


class Records:
    """All records of an input, in order.

    Args:
        path: A jsonl or parquet file, a glob, a folder, any fsspec URL, or ``hub:NAME`` with an
            optional configuration and split, as in ``hub:HuggingFaceTB/smoltalk2@SFT/train``.

    Raises:
        UserError: there is no such input.
    """

    def __init__(self, path: str):
        self.path = path
        if path.startswith(HUB):
            name, _, rest = path.removeprefix(HUB).partition("@")
            config, _, split = rest.rpartition("/")
            self._source: Any = HubDataset(name, config or None, split or "train")
        else:
            self._source = Files((str(resolve(path)),))

    def inputs(self) -> dict[str, Any]:
        """What was read, JSON-serialisable: changes when the input changes."""
        hub = isinstance(self._source, HubDataset)
        return {"hub": self.path} if hub else self._source.inputs()

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each record after the words that name its place.

        Raises:
            UserError: a record cannot be read.
        """
        if isinstance(self._source, HubDataset):
            for row, record in enumerate(self._source.load()):
                yield f"{self.path}, row {row}", record
            return
        for url, _, _ in self._source.files:
            shown = url.removeprefix("file://")
            kind = format_of(url)
            if kind == "text":
                raise UserError(f"{shown} is text, expected records: jsonl or parquet")
            yield from _jsonl(url, shown) if kind == "jsonl" else _parquet(url, shown)


def _jsonl(url: str, shown: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import fsspec

    with fsspec.open(url, "rb", compression="infer") as stream:
        lines = enumerate(stream, 1)
        while True:
            try:
                number, line = next(lines)
            except StopIteration:
                return
            except (OSError, EOFError, zlib.error) as error:  # of a broken compressed file
                raise UserError(f"{shown} cannot be read ({one_line(error)})") from None
            if not line.strip():
                continue
            where = f"{shown}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: broken JSON ({error})") from None
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise UserError(f"{where}: expected a JSON object per line, seen {kind}")
            yield where, record


def _parquet(url: str, shown: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import fsspec
    import pyarrow
    import pyarrow.parquet

    try:
        with fsspec.open(url, "rb") as stream:
            row = 0
            for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(1024):
                for record in batch.to_pylist():
                    yield f"{shown}, row {row}", record
                    row += 1
    except pyarrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{shown}: not a readable parquet file ({reason})") from None
