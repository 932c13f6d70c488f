"""Reading documents from jsonl, parquet and text files behind any fsspec URL.

A source names its input once and cuts it into shards. A shard is read by one worker from end to
end, and where the cuts fall depends on the input alone, never on the number of workers.
"""

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import Any, Protocol

from smol.errors import UserError, nearest

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")


@dataclass(frozen=True)
class Piece:
    """A file, or a range of one: bytes of a jsonl file, row groups of parquet, rows of a dataset.

    ``stop`` is None where the piece is everything from ``start`` on.
    """

    path: str
    size: int
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Shard:
    """What one worker reads: pieces of about the same total size, in order."""

    pieces: tuple[Piece, ...]
    reader: Callable[[Piece], Iterator[str]]  # crosses processes

    @property
    def size(self) -> int:
        """Bytes of input, for the progress line; an estimate where the input is compressed."""
        return sum(piece.size for piece in self.pieces)

    def __iter__(self) -> Iterator[str]:
        for piece in self.pieces:
            yield from self.reader(piece)


class Documents(Protocol):
    """A source of documents: ``Files``, ``HubDataset``, or anything with these three methods."""

    def shards(self) -> list[Shard]:
        """Cut the input. The same input gives the same list, in the same order."""

    def settings(self) -> dict[str, Any]:
        """Everything that shapes the documents and their order, JSON-serialisable."""

    def inputs(self) -> dict[str, Any]:
        """What was read, JSON-serialisable: changes when the input changes."""


def pack(pieces: Iterable[Piece], shard_bytes: int, reader: Callable) -> list[Shard]:
    """Join consecutive pieces into shards of about ``shard_bytes`` bytes of input."""
    groups, size = [], 0
    for piece in pieces:
        if not groups or size + piece.size / 2 > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.size
    if len(groups) > 1 and size < shard_bytes / 2:
        last = groups.pop()
        groups[-1] += last
    return [Shard(tuple(group), reader) for group in groups]


def even_ranges(total: int, parts: float) -> Iterator[tuple[int, int]]:
    """Yield ``(start, stop)`` that cut 0 to ``total`` into about ``parts`` equal ranges."""
    count = max(1, round(parts))
    cuts = [total * i // count for i in range(count + 1)]
    return itertools.pairwise(cuts)


@dataclass(frozen=True)
class Files:
    """Documents in files.

    Args:
        paths: Paths, globs, folders or fsspec URLs (``s3://bucket/*.jsonl.gz``).
        format: ``jsonl``, ``parquet``, ``text``, or ``auto`` to go by the suffix.
        field: The name of the text in a jsonl record or a parquet row.
        separator: Where a text file is cut into documents; None makes a file one document.
        shard_bytes: Input bytes per shard. A compressed file is never cut.
    """

    paths: tuple[str, ...]
    format: str = "auto"
    field: str = "text"
    separator: str | None = None
    shard_bytes: int = 64 * 2**20

    def settings(self) -> dict[str, Any]:
        """Return what shapes the documents; the paths are among the inputs instead."""
        keys = ("format", "field", "separator", "shard_bytes")
        return {key: getattr(self, key) for key in keys}

    def inputs(self) -> dict[str, Any]:
        """Return the number of files, their bytes, and a digest of names, sizes and dates."""
        files = self.files
        identity = [[PurePosixPath(path).name, size, changed] for path, size, changed in files]
        return {
            "files": len(files),
            "bytes": sum(size for _, size, _ in files),
            "digest": hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        }

    @cached_property
    def files(self) -> list[tuple[str, int, str]]:
        """``(url, size in bytes, date or tag of the last change)`` of each file, in order."""
        found = dict.fromkeys(entry for path in self.paths for entry in _expand(path))
        if not found:
            raise UserError("no documents to read: give at least one file, glob or URL.")
        return list(found)

    def shards(self) -> list[Shard]:
        """Cut big jsonl files by bytes and parquet by row groups, and group small files."""
        pieces = [piece for path, size, _ in self.files for piece in self._cut(path, size)]
        return pack(
            pieces, self.shard_bytes, partial(_read, self.format, self.field, self.separator)
        )

    def _cut(self, path: str, size: int) -> list[Piece]:
        kind = format_of(path, self.format)
        if kind == "parquet":
            return _row_groups(path, self.field)
        if kind == "text" or path.endswith(COMPRESSIONS):
            return [Piece(path, size)]
        ranges = even_ranges(size, size / self.shard_bytes)
        return [Piece(path, stop - start, start, stop) for start, stop in ranges]


def format_of(path: str, given: str = "auto") -> str:
    """Return the format of a file, by its suffix unless it was given.

    Raises:
        UserError: The given format is unknown, or the suffix does not tell.
    """
    if given != "auto":
        if given not in FORMATS.values():
            raise UserError(
                f"unknown format '{given}': expected auto, jsonl, parquet or text."
                + nearest(given, FORMATS.values())
            )
        return given
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    plain = [suffix for suffix in suffixes if suffix not in COMPRESSIONS]
    if not plain or plain[-1] not in FORMATS:
        raise UserError(
            f"{_shown(path)}: cannot tell the format from its name; expected one of "
            f"{', '.join(FORMATS)}, or give --format jsonl, parquet or text."
        )
    return FORMATS[plain[-1]]


def _shown(url: str) -> str:
    return url.removeprefix("file://")


def _expand(path: str) -> list[tuple[str, int, str]]:
    """Resolve one path, glob, folder or URL to the files it means, sorted by name."""
    import fsspec
    from fsspec.core import has_magic

    fs, inner = fsspec.url_to_fs(str(path))
    if has_magic(inner):
        names = [name for name in fs.glob(inner) if not fs.isdir(name)]
    elif fs.isdir(inner):
        names = [n for n in fs.find(inner) if set(PurePosixPath(n).suffixes) & set(FORMATS)]
    else:
        names = [inner] if fs.exists(inner) else []
    if not names:
        parent = inner.rsplit("/", 1)[0]
        beside = fs.ls(parent, detail=False) if fs.isdir(parent) else []
        hint = nearest(PurePosixPath(inner).name, [PurePosixPath(name).name for name in beside])
        raise UserError(f"{path}: no such file, and no file matches it.{hint}")
    entries = []
    for name in sorted(names):
        info = fs.info(name)
        changed = info.get("ETag") or info.get("mtime") or info.get("LastModified") or ""
        entries.append((fs.unstrip_protocol(name), info["size"], str(changed)))
    return entries


def _open(path: str) -> io.BufferedIOBase:
    import fsspec

    if path.endswith(".zst"):  # fsspec needs a package of its own for these; pyarrow is here
        import pyarrow

        raw = pyarrow.CompressedInputStream(fsspec.open(path, "rb").open(), "zstd")
        return io.BufferedReader(raw, 2**16)
    return fsspec.open(path, "rb", compression="infer").open()


def _read(given: str, name: str, separator: str | None, piece: Piece) -> Iterator[str]:
    """Yield the documents of one piece; a record whose text is null or empty is left out."""
    kind = format_of(piece.path, given)
    if kind == "jsonl":
        return _read_jsonl(piece, name)
    if kind == "parquet":
        return _read_parquet(piece, name)
    return _read_text(piece, separator)


def _read_jsonl(piece: Piece, name: str) -> Iterator[str]:
    """Yield the documents whose line begins within the piece."""
    with _open(piece.path) as stream:
        position = piece.start
        if piece.start:
            # The line that crosses the cut belongs to the piece before. One byte back, so that a
            # line that begins exactly at the cut is ours.
            stream.seek(piece.start - 1)
            position += len(stream.readline()) - 1
        for number, line in enumerate(stream):
            if piece.stop is not None and position >= piece.stop:
                return
            position += len(line)
            if line.strip():
                where = partial(_line_number, piece, number)
                yield from field(_parse(line, where), name, where)


def _line_number(piece: Piece, number: int) -> str:
    """Return ``path:line`` of the piece's ``number``-th line; counts lines, so for errors only."""
    before = 0
    if piece.start:
        with _open(piece.path) as stream:
            before = sum(1 for _ in io.BytesIO(stream.read(piece.start)))
    return f"{_shown(piece.path)}:{before + number + 1}"


def _parse(line: bytes, where: Callable[[], str]) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        seen = line.decode("utf-8", "replace").strip()
        shown = seen if len(seen) <= 60 else seen[:57] + "..."
        raise UserError(f"{where()}: broken JSON ({error}), seen: {shown}") from None
    if not isinstance(record, dict):
        raise UserError(
            f"{where()}: expected a JSON object per line, seen {type(record).__name__}."
        )
    return record


def field(record: dict[str, Any], name: str, where: Callable[[], str]) -> Iterator[str]:
    """Yield the text of a record, or nothing where it is null or empty.

    Raises:
        UserError: There is no such field, or it is not text; ``where()`` names the record.
    """
    if name not in record:
        raise UserError(no_field(where(), name, record))
    text = record[name]
    if not isinstance(text, str | None):
        raise UserError(f"{where()}: field '{name}' holds {type(text).__name__}, expected text.")
    if text:
        yield text


def no_field(where: str, name: str, known: Iterable[str]) -> str:
    """Word the error that a field is missing."""
    fields = ", ".join(f"'{key}'" for key in known) or "none"
    hint = nearest(name, known)
    return f"{where} has no field '{name}', its fields are: {fields}; set --field.{hint}"


def _parquet(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(_open(path))
    except pyarrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{_shown(path)}: not a readable parquet file ({reason})") from None


def _row_groups(path: str, name: str) -> list[Piece]:
    file = _parquet(path)
    if name not in file.schema_arrow.names:
        raise UserError(no_field(_shown(path), name, file.schema_arrow.names))
    groups = range(file.metadata.num_row_groups)
    sizes = [file.metadata.row_group(group).total_byte_size for group in groups]
    return [Piece(path, size, group, group + 1) for group, size in zip(groups, sizes, strict=True)]


def _read_parquet(piece: Piece, name: str) -> Iterator[str]:
    file = _parquet(piece.path)
    groups = list(range(piece.start, piece.stop))
    row = 0
    for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[name]):
        for value in batch.column(0).to_pylist():
            where = partial("{}, row group {}, row {}".format, _shown(piece.path), piece.start, row)
            yield from field({name: value}, name, where)
            row += 1


def _read_text(piece: Piece, separator: str | None) -> Iterator[str]:
    with _open(piece.path) as stream:
        data = stream.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{_shown(piece.path)}: not UTF-8 (byte {error.start} is 0x{data[error.start]:02x})."
        ) from None
    for part in [text] if separator is None else text.split(separator):
        document = part.strip("\n")
        if document:
            yield document
