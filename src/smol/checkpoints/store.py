"""Committed checkpoints in a folder or behind any fsspec URL.

A checkpoint counts from the moment its commit marker exists, and not before:

1. The payload is written to a temporary name, hashed and flushed to the disk.
2. ``manifest.json`` lists its files with sizes and SHA-256, and says what the checkpoint is.
3. ``COMMITTED`` comes last and holds the manifest's SHA-256.

On a local disk the finished folder is then renamed into place; elsewhere the files are uploaded in
this order, and read back before the marker. Readers ignore whatever has no marker that fits its
manifest. Keys are never written twice: ``step-00000120-<attempt>``. The order is that of (lineage,
step) in the manifests; the clock and the names decide nothing. Deletion takes the marker first, so
an interrupted one leaves what an interrupted save leaves, and the next save removes both. A store
has one writer.
"""

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from smol.checkpoints.format import NonFiniteError, fsync
from smol.checkpoints.manifest import (
    MANIFEST_FILE,
    MARKER_FILE,
    Manifest,
    Write,
    committed,
    is_key,
    new_key,
    read_manifest,
    verify_files,
)
from smol.errors import UserError

__all__ = [
    "MANIFEST_FILE",
    "MARKER_FILE",
    "CheckpointInfo",
    "CheckpointStore",
    "FsspecStore",
    "Manifest",
    "NonFiniteError",
    "committed",
    "is_key",
    "read_manifest",
    "verify_files",
]

log = logging.getLogger(__name__)

_STAGING = ".staging-"


@dataclass(frozen=True)
class CheckpointInfo:
    """A committed checkpoint.

    Args:
        key: Name of its folder in the store.
        location: Path or URL of its folder, for people.
        manifest: What it is.
    """

    key: str
    location: str
    manifest: Manifest


def order(info: CheckpointInfo) -> tuple[int, int, str]:
    """The order of checkpoints: by lineage and step, never by clock."""
    return info.manifest.lineage, info.manifest.step, info.key


class CheckpointStore(Protocol):
    """Where checkpoints live."""

    def list(self) -> list[CheckpointInfo]:
        """Return the committed checkpoints, in order of (lineage, step)."""

    def save(self, step: int, write: Write, metadata: dict[str, Any]) -> CheckpointInfo:
        """Write and commit a checkpoint.

        Args:
            step: Optimiser steps taken.
            write: Writes the payload into the empty folder that it is given. Nothing is kept of it
                if it raises, as on a weight that is not finite.
            metadata: Further fields of the :class:`Manifest`, by name.

        Returns:
            The committed checkpoint.
        """

    def verify(self, info: CheckpointInfo) -> None:
        """Compare every file with the manifest, by size and SHA-256.

        Raises:
            UserError: If one differs or is missing; it is named.
        """

    def load_path(self, info: CheckpointInfo) -> Path:
        """Return a local folder with the checkpoint, downloaded and verified where necessary."""

    def delete(self, info: CheckpointInfo) -> None:
        """Delete a checkpoint, its marker first."""

    def latest_verified(self, infos: "list[CheckpointInfo] | None" = None) -> CheckpointInfo | None:
        """Return the newest checkpoint that passes :meth:`verify`; None if there is none.

        Args:
            infos: What :meth:`list` returned, where the caller has called it.
        """


class FsspecStore:
    """A :class:`CheckpointStore` in a local folder or behind any fsspec URL.

    Args:
        url: Path or URL of the folder, such as ``runs/stage1/checkpoints`` or
            ``s3://bucket/run``.
        cache: Local folder for uploads in preparation and for downloads, where ``url`` is remote;
            None for one in the system's temporary folder.
        storage_options: Of the file system, such as endpoint and keys of an S3 server.
    """

    def __init__(
        self,
        url: str | Path,
        cache: str | Path | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        self.fs, self.root = url_to_fs(str(url), **(storage_options or {}))
        self.is_local = isinstance(self.fs, LocalFileSystem)
        if self.is_local:
            self._work = Path(self.root)
        elif cache is not None:
            self._work = Path(cache)
        else:
            digest = hashlib.sha256(str(url).encode()).hexdigest()[:12]
            self._work = Path(tempfile.gettempdir()) / f"smol-checkpoints-{digest}"

    def list(self) -> list[CheckpointInfo]:
        """See :meth:`CheckpointStore.list`. A marker that fits no manifest is reported."""
        infos = []
        for key in self.marked():
            try:
                manifest = read_manifest(self.fs, f"{self.root}/{key}")
            except UserError as error:
                log.warning("checkpoint ignored: %s", error)
            else:
                infos.append(self._info(key, manifest))
        return sorted(infos, key=order)

    def marked(self) -> "list[str]":
        """Return the keys with a commit marker, whether or not their checkpoints are whole."""
        keys = self._keys()
        return [key for key in keys if self.fs.exists(f"{self.root}/{key}/{MARKER_FILE}")]

    def save(self, step: int, write: Write, metadata: dict[str, Any]) -> CheckpointInfo:
        """See :meth:`CheckpointStore.save`."""
        self.remove_leftovers()
        key = new_key(step)
        staging = self._work / f"{_STAGING}{key}"
        with committed(staging, step, write, metadata) as manifest:
            if self.is_local:
                os.rename(staging, self._work / key)
                fsync(self._work)
            else:
                self.upload(staging, key, manifest)
        return self._info(key, manifest)

    def verify(self, info: CheckpointInfo) -> None:
        """See :meth:`CheckpointStore.verify`."""
        folder = f"{self.root}/{info.key}"
        self.fs.invalidate_cache()
        verify_files(self.fs, folder, read_manifest(self.fs, folder))

    def is_sound(self, info: CheckpointInfo) -> bool:
        """Whether a checkpoint passes :meth:`verify`."""
        try:
            self.verify(info)
        except UserError:
            return False
        return True

    def load_path(self, info: CheckpointInfo) -> Path:
        """See :meth:`CheckpointStore.load_path`."""
        target = self._work / info.key
        if self.is_local:
            return target
        local = LocalFileSystem()
        if not target.exists():
            self._work.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._work, prefix=_STAGING) as name:
                folder = Path(name) / info.key
                for file in (*info.manifest.files, MANIFEST_FILE, MARKER_FILE):
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    self.fs.get_file(f"{self.root}/{info.key}/{file}", str(folder / file))
                verify_files(local, str(folder), info.manifest)
                os.rename(folder, target)
        else:
            verify_files(local, str(target), info.manifest)
        return target

    def delete(self, info: CheckpointInfo) -> None:
        """See :meth:`CheckpointStore.delete`."""
        self.fs.rm_file(f"{self.root}/{info.key}/{MARKER_FILE}")
        if self.is_local:
            fsync(self._work / info.key)
        self.fs.rm(f"{self.root}/{info.key}", recursive=True)

    def latest_verified(self, infos: "list[CheckpointInfo] | None" = None) -> CheckpointInfo | None:
        """See :meth:`CheckpointStore.latest_verified`. Every one passed over is reported."""
        for info in reversed(self.list() if infos is None else infos):
            try:
                self.verify(info)
            except UserError as error:
                log.warning("falling back to the checkpoint before %s: %s", info.key, error)
            else:
                return info
        return None

    def _info(self, key: str, manifest: Manifest) -> CheckpointInfo:
        folder = f"{self.root}/{key}"
        location = folder if self.is_local else self.fs.unstrip_protocol(folder)
        return CheckpointInfo(key, location, manifest)

    def _keys(self) -> "list[str]":
        """Return the keys of all folders, committed or not."""
        self.fs.invalidate_cache()
        try:
            paths = self.fs.ls(self.root, detail=False)
        except FileNotFoundError:
            return []
        names = (path.rstrip("/").rpartition("/")[2] for path in paths)
        return sorted(name for name in names if is_key(name))

    def upload(
        self,
        folder: Path,
        key: str,
        manifest: Manifest,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy a committed local folder here: payload, manifest, read back, marker.

        Args:
            folder: The checkpoint; other files in it are not copied.
            key: Its key, which stays the same.
            manifest: Its manifest.
            check: Called before the marker; what it raises leaves the copy without one.

        Raises:
            UserError: If what is read back is not what was written; there is no marker then.
        """
        target = f"{self.root}/{key}"
        for name in (*manifest.files, MANIFEST_FILE):
            self._put(folder / name, f"{target}/{name}")
        self.fs.invalidate_cache()
        verify_files(self.fs, target, manifest)
        check()
        self._put(folder / MARKER_FILE, f"{target}/{MARKER_FILE}")
        read_manifest(self.fs, target)

    def _put(self, source: Path, target: str) -> None:
        if self.is_local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.fs.put_file(str(source), target)
        if self.is_local:
            fsync(Path(target))
            fsync(Path(target).parent)

    def remove_leftovers(self) -> None:
        """Remove what interrupted saves and deletions have left."""
        for folder in self._work.glob(f"{_STAGING}*"):
            shutil.rmtree(folder, ignore_errors=True)
        for key in set(self._keys()) - set(self.marked()):
            self.fs.rm(f"{self.root}/{key}", recursive=True)
