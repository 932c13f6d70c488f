"""The card of a prepared source: what it holds, how it was made, and how to check it.

A source is a folder with ``train/``, ``held_out/`` and ``card.json``. The card is written last, so
a folder with a card is complete.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smol.data.remote import filesystem
from smol.errors import UserError
from smol.paths import is_url

FORMAT = 1
NAME = "card.json"
SEAL = "sha256"  # the digest of all else that card.json says
SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class Chunk:
    """One chunk file: a 12-byte header, then ``tokens`` token ids.

    Args:
        file: Name within the folder of its split.
        documents: Whole documents within; none crosses into another chunk.
        tokens: Token ids, each document's end-of-text token included.
        bytes: Size of the file, header included.
        sha256: Digest of the whole file, in hexadecimal.
    """

    file: str
    documents: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Card:
    """What ``card.json`` says. ``documents``, ``tokens``, ``bytes`` and ``chunks`` are per split.

    Args:
        name: Name of the source.
        documents: Documents per split.
        tokens: Tokens per split.
        bytes: UTF-8 bytes of the text per split (for bits per byte), not of the chunk files.
        tokenizer: ``digest``, ``vocab_size``, ``eos_id`` and ``bos_id`` (or None).
        dtype: ``uint16`` or ``int32``, little-endian.
        settings: Everything that shaped the output.
        inputs: What was read; not part of the identity.
        chunks: The chunk files per split, in order.
        digest: SHA-256 over the chunks' digests, the tokenizer and the settings: the identity of
            the data.
        format: Version of this layout.
    """

    name: str
    documents: dict[str, int]
    tokens: dict[str, int]
    bytes: dict[str, int]
    tokenizer: dict[str, Any]
    dtype: str
    settings: dict[str, Any]
    inputs: dict[str, Any]
    chunks: dict[str, list[Chunk]]
    digest: str
    format: int = FORMAT


def identity(chunks: dict[str, list[Chunk]], tokenizer: dict[str, Any], settings: dict) -> str:
    """Return the SHA-256 that names the data, in hexadecimal."""
    digests = {split: [chunk.sha256 for chunk in chunks[split]] for split in SPLITS}
    text = json.dumps([FORMAT, digests, tokenizer, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that is either whole or not there, also after a crash."""
    # The process id keeps two writers apart, so neither renames what the other is still writing.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with ``write_atomic``."""
    write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_card(folder: Path, card: Card) -> None:
    """Write ``card.json`` and seal it with its digest; call it last."""
    fields = asdict(card)
    write_json(Path(folder) / NAME, {**fields, SEAL: _seal(fields)})


def _seal(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_card(folder: str | Path, storage_options: dict[str, Any] | None = None) -> Card:
    """Read the card of a prepared source.

    A card without a seal is taken as it is; early ones have none.

    Args:
        folder: Local, or any fsspec URL.
        storage_options: Passed to fsspec (endpoint, credentials, …).

    Raises:
        UserError: There is no card, it is broken or was edited, or its format is not the one known
            here.
    """
    path = f"{str(folder).rstrip('/')}/{NAME}"
    text = _read_text(path, storage_options or {})
    if text is None:
        raise UserError(f"{folder} has no {NAME}: run python src/prepare.py --output {folder} ...")
    again = f"run python src/prepare.py --output {folder} --overwrite ..."
    try:
        fields = json.loads(text)
        if fields["format"] != FORMAT:
            raise UserError(f"{path} has format {fields['format']}, expected {FORMAT}: {again}")
        seal = fields.pop(SEAL, None)
        if seal is not None and seal != _seal(fields):
            raise UserError(
                f"{path} was changed since it was written, its content does not fit its {SEAL} "
                f"{seal[:12]}…: put the original back, or {again}"
            )
        chunks = {split: [Chunk(**entry) for entry in fields["chunks"][split]] for split in SPLITS}
        return Card(**{**fields, "chunks": chunks})
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a readable card ({error!r}): {again}") from None


def _read_text(path: str, storage_options: dict[str, Any]) -> str | None:
    """Return the text of a file behind a path or URL; None if there is no such file."""
    try:
        fs, name = filesystem(path, storage_options)
        return fs.cat_file(name).decode()
    except FileNotFoundError:
        return None
    except Exception as error:  # each store has its own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot read {path} ({reason}); check the address and credentials"
        ) from None


def check_chunk(file: Path, entry: Chunk, digest: bool = True) -> None:
    """Compare a chunk file with its entry in the card.

    Raises:
        UserError: missing, of another size, or (with ``digest``) of another SHA-256.
    """
    again = "prepare the source again with --overwrite, or copy the file again"
    if not file.exists():
        raise UserError(f"chunk {file} is missing, but the card lists it; {again}")
    size = file.stat().st_size
    if size != entry.bytes:
        raise UserError(f"chunk {file} has {size} bytes; the card says {entry.bytes}; {again}")
    if digest and (seen := _sha256(file)) != entry.sha256:
        raise UserError(
            f"chunk {file} is corrupt: SHA-256 {seen[:12]}…; the card says "
            f"{entry.sha256[:12]}…; {again}"
        )


def verify(folder: str | Path) -> list[str]:
    """Check a prepared source: its card, and every chunk that the card lists.

    Args:
        folder: A local folder.

    Returns:
        One line for each damaged chunk; none if the source is whole.

    Raises:
        UserError: There is no card, it is damaged, or the folder is a URL.
    """
    if is_url(folder):
        raise UserError(
            f"{folder} is a URL, expected a local folder; each chunk of a remote one "
            "is checked when it is fetched"
        )
    problems = []
    for split, chunks in read_card(folder).chunks.items():
        for chunk in chunks:
            try:
                check_chunk(Path(folder, split, chunk.file), chunk)
            except UserError as error:
                problems.append(str(error))
    return problems


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
