"""Chunk files in litdata's layout, and the index that makes a folder of them a dataset.

A chunk is a litdata chunk of one item: three little-endian uint32 ``[1, 12, file size]``, then the
token ids, little-endian, from byte 12 to the end of the file.
"""

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from smol.data.card import Chunk, write_atomic
from smol.errors import UserError

HEADER_BYTES = 12
# litdata's number for the torch type of the same name, and how many ids it can tell apart.
DTYPES = {"uint16": (20, 2**16), "int32": (16, 2**31)}


class ChunkWriter:
    """Writes documents into chunk files of about ``chunk_tokens``, cut at documents' ends.

    At most two chunks' worth of tokens is held; what is left at the end is cut evenly, so no
    chunk is much shorter than the others. A document longer than a chunk makes a longer chunk.

    Args:
        folder: Where the files go.
        stem: Beginning of the files' names.
        chunk_tokens: Tokens per chunk, about.
        shuffle: Order the held documents by their key.
    """

    def __init__(self, folder: Path, stem: str, chunk_tokens: int, shuffle: bool) -> None:
        self.folder, self.stem = folder, stem
        self.chunk_tokens, self.shuffle = chunk_tokens, shuffle
        self.chunks: list[Chunk] = []
        self._held: list[tuple[bytes, np.ndarray]] = []
        self._tokens = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, tokens: np.ndarray, key: bytes = b"") -> None:
        """Add one document: ids ``(tokens,)`` with the end-of-text id last."""
        self._held.append((key, tokens))
        self._tokens += len(tokens)
        if self._tokens >= 2 * self.chunk_tokens:
            self._write(self._tokens // self.chunk_tokens, last=False)

    def close(self) -> list[Chunk]:
        """Write what is left and return all chunks in order."""
        if self._held:
            self._write(max(1, round(self._tokens / self.chunk_tokens)), last=True)
        return self.chunks

    def _write(self, parts: int, last: bool) -> None:
        """Cut what is held into ``parts`` nearly equal ones; keep the last unless it is the end."""
        if self.shuffle:
            self._held.sort(key=lambda document: document[0])
        documents = [tokens for _, tokens in self._held]
        ends = np.cumsum([len(tokens) for tokens in documents])
        ideal = ends[-1] * np.arange(1, parts) / parts
        above = np.searchsorted(ends, ideal)
        nearer_below = (above > 0) & (ideal - ends[above - 1] < ends[above] - ideal)
        cuts = np.unique([0, *(above - nearer_below + 1), len(documents)])
        for start, stop in itertools.pairwise(cuts if last else cuts[:-1]):
            self._write_chunk(documents[start:stop])
        self._held = [] if last else self._held[cuts[-2] :]
        self._tokens = sum(len(tokens) for _, tokens in self._held)

    def _write_chunk(self, documents: list[np.ndarray]) -> None:
        tokens = np.concatenate(documents)
        size = HEADER_BYTES + tokens.nbytes
        if size >= 2**32:
            raise UserError(
                f"{self.folder}: one document has {len(tokens):,} tokens, more than a chunk can "
                "hold: cut it with --separator"
            )
        data = np.array([1, HEADER_BYTES, size], "<u4").tobytes() + tokens.tobytes()
        file = f"{self.stem}-{len(self.chunks):04d}.bin"
        write_atomic(self.folder / file, data)
        digest = hashlib.sha256(data).hexdigest()
        self.chunks.append(Chunk(file, len(documents), len(tokens), size, digest))


def litdata_index(chunks: list[Chunk], dtype: str, digest: str) -> dict[str, Any]:
    """Return litdata's ``index.json`` for ``StreamingDataset(item_loader=TokensLoader(...))``."""
    return {
        "chunks": [
            {
                "chunk_bytes": chunk.bytes,
                "chunk_size": 1,
                "dim": chunk.tokens,
                "filename": chunk.file,
            }
            for chunk in chunks
        ],
        "config": {
            "chunk_bytes": None,
            "chunk_size": None,
            "compression": None,
            "data_format": [f"no_header_tensor:{DTYPES[dtype][0]}"],
            "data_spec": '[1, {"type": null, "context": null, "children_spec": []}]',
            "encryption": None,
            "item_loader": "TokensLoader",
        },
        # litdata drops its cache of a dataset when this changes.
        "updated_at": digest,
    }
