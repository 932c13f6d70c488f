"""Random access to the token chunks of a prepared source, on disk or in an object store.

Chunks are litdata's files (a header of offsets, then the tokens of all items without gaps), mapped
into memory and read by position. They are fetched and checked here rather than by litdata's reader,
because that one reads corrupt bytes in silence and stalls when its cache is smaller than what is
read at random.
"""

import contextlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from smol.data.card import Card, Chunk, check_chunk, read_card
from smol.data.remote import filesystem
from smol.errors import UserError
from smol.paths import is_url, resolve

MAX_OPEN_CHUNKS = 64  # memory maps held open per stream; each costs address space, not memory
FETCH_ATTEMPTS = 5
FETCH_BACKOFF_SECONDS = 0.5


class TokenStream:
    """One split of a prepared source, read by chunk and position.

    Args:
        path: The prepared folder (local, or any fsspec URL), as written by ``src/prepare.py``.
        split: ``"train"`` or ``"held_out"``.
        cache: Where chunks of a remote source are kept; required for URLs.
        verify: Compare each chunk with the card's SHA-256 when it is first opened, not only its
            size.

    Raises:
        UserError: no card, or no chunk in this split.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        cache: "ChunkCache | None" = None,
        verify: bool = True,
    ):
        self.path = str(resolve(path))
        self.split, self.cache, self.verify = split, cache, verify
        storage_options = cache.storage_options if cache else {}
        self.card: Card = read_card(self.path, storage_options)
        self.chunks = self.card.chunks[split]
        if not self.chunks:
            raise UserError(
                f"{self.path} has no {split} data; prepare it again with more documents"
            )
        self.dtype = np.dtype(self.card.dtype)
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()

    @property
    def chunk_tokens(self) -> list[int]:
        """Tokens in each chunk."""
        return [chunk.tokens for chunk in self.chunks]

    def read(self, chunk: int, start: int, length: int) -> np.ndarray:
        """Tokens ``[start, start + length)`` of a chunk. Shape ``(length,)``, the stream's dtype.

        Raises:
            UserError: the chunk is missing, truncated or corrupt, or could not be fetched.
        """
        tokens = self._open.get(chunk)
        if tokens is None:
            tokens = self._open[chunk] = self._map(chunk)
            if len(self._open) > MAX_OPEN_CHUNKS:
                self._open.popitem(last=False)
        return tokens[start : start + length]

    def _map(self, chunk: int) -> np.ndarray:
        entry = self.chunks[chunk]
        if is_url(self.path):
            url = f"{self.path.rstrip('/')}/{self.split}/{entry.file}"
            return self.cache.open(url, entry, self.card.digest, self._open_file, self.verify)
        file = Path(self.path, self.split, entry.file)
        check_chunk(file, entry, self.verify)
        return self._open_file(file, entry)

    def _open_file(self, file: Path, entry: Chunk) -> np.ndarray:
        items = int(np.fromfile(file, dtype=np.uint32, count=1)[0])
        # The header: the number of items, then as many offsets and one more.
        offset = 4 * (2 + items)
        return np.memmap(file, self.dtype, mode="r", offset=offset, shape=(entry.tokens,))

    def __getstate__(self) -> dict:
        # Memory maps do not travel to data workers; each opens its own.
        return self.__dict__ | {"_open": OrderedDict()}


class ChunkCache:
    """Local copies of remote chunks, the least recently used dropped first.

    Args:
        folder: Where the copies live; shared by all workers and ranks of a machine.
        max_bytes: How much they may take.
        storage_options: Passed to fsspec (endpoint, credentials, …).
    """

    def __init__(self, folder: str | Path, max_bytes: int, storage_options: dict | None = None):
        self.folder, self.max_bytes = resolve(folder), max_bytes
        self.storage_options = storage_options or {}

    def open(
        self,
        url: str,
        entry: Chunk,
        data_digest: str,
        reader: Callable[[Path, Chunk], np.ndarray],
        verify: bool = True,
    ) -> np.ndarray:
        """Open the local copy of a chunk, fetched when it is not there or not whole.

        Args:
            url: Where the chunk is.
            entry: What the card says of it.
            data_digest: Digest of the data it belongs to.
            reader: Opens the local file.
            verify: Check the SHA-256 of a copy that was already there, too.

        Raises:
            UserError: the store does not give the chunk, or gives other bytes than the card lists.
        """
        from filelock import FileLock

        file = self.folder / data_digest[:16] / f"{entry.sha256[:16]}-{entry.file}"
        file.parent.mkdir(parents=True, exist_ok=True)
        # One process of the machine fetches a chunk, the others wait for it.
        with FileLock(f"{file}.lock"):
            try:
                check_chunk(file, entry, verify)
            except UserError:
                self._fetch(url, file, entry)
            try:
                os.utime(file)
                return reader(file, entry)
            except FileNotFoundError:  # another process has made room in the meantime
                self._fetch(url, file, entry)
                return reader(file, entry)

    def _fetch(self, url: str, file: Path, entry: Chunk) -> None:
        from filelock import FileLock

        file.unlink(missing_ok=True)
        with FileLock(f"{self.folder}/.room.lock"):
            self._make_room(entry.bytes)
        self._download(url, file, entry)

    def _download(self, url: str, file: Path, entry: Chunk) -> None:
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        for attempt in range(1, FETCH_ATTEMPTS + 1):
            try:
                # Another attempt begins a new session: the old one may be what is broken.
                fs, remote = filesystem(url, self.storage_options, renew=attempt > 1)
                fs.get_file(remote, str(part))
                check_chunk(part, entry)
                part.replace(file)
                return
            except Exception as error:
                part.unlink(missing_ok=True)
                if attempt == FETCH_ATTEMPTS or isinstance(error, FileNotFoundError):
                    line = str(error).splitlines()[0] if str(error) else type(error).__name__
                    raise UserError(
                        f"cannot read {url} ({line}) after {attempt} attempts; check the address, "
                        "the credentials and the prepared folder"
                    ) from error
                time.sleep(FETCH_BACKOFF_SECONDS * 2 ** (attempt - 1))

    def _make_room(self, needed: int) -> None:
        files = []
        for file in self.folder.glob("*/*.bin*"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                stat = file.stat()
                if file.suffix == ".lock":
                    continue
                files.append((stat.st_mtime_ns, stat.st_size, file))
        used = sum(size for _, size, _ in files)
        for _, size, file in sorted(files):
            if used + needed <= self.max_bytes:
                return
            if file.suffix == ".part":
                continue  # another process is fetching it
            # Readers that have the file mapped keep their pages until they let go.
            file.unlink(missing_ok=True)
            used -= size
