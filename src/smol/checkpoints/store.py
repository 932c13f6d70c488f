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
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from smol.checkpoints.format import fsync, non_finite_tensor
from smol.errors import UserError

log = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
MARKER_FILE = "COMMITTED"

_KEY = re.compile(r"step-\d{8,}-[0-9a-f]{8}")
_STAGING = ".staging-"


class NonFiniteError(UserError):
    """A checkpoint was refused because a weight or a moment is infinite or not a number."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is and of which bytes it consists.

    Args:
        step: Optimiser steps taken.
        files: By name relative to the folder, ``{"bytes": size, "sha256": hexadecimal digest}``.
        finite: Whether every weight and moment is finite.
        created: Time of writing, ISO 8601 in UTC; for people, nothing is decided by it.
        lineage: Counts the times that a run went back and took another path.
        tokens: Tokens trained on.
        run_name: The run.
        parent: Key of the checkpoint that the run was resumed from.
        world_size: Processes that trained it.
        config_digest: Digest of the run's configuration.
    """

    step: int
    files: dict[str, dict[str, Any]]
    finite: bool
    created: str
    lineage: int = 0
    tokens: int = 0
    run_name: str = ""
    parent: str | None = None
    world_size: int = 1
    config_digest: str = ""


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


class CheckpointStore(Protocol):
    """Where checkpoints live."""

    def list(self) -> list[CheckpointInfo]:
        """Return the committed checkpoints, in order of (lineage, step)."""

    def save(
        self, step: int, write: Callable[[Path], None], metadata: dict[str, Any]
    ) -> CheckpointInfo:
        """Write and commit a checkpoint.

        Args:
            step: Optimiser steps taken.
            write: Writes the payload into the empty folder that it is given.
            metadata: Further fields of the :class:`Manifest`, by name.

        Returns:
            The committed checkpoint.

        Raises:
            NonFiniteError: If a weight or a moment is not finite; nothing is kept then.
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


def new_key(step: int) -> str:
    """Return a key that no other checkpoint has: ``step-00000120-<attempt>``."""
    return f"step-{step:08d}-{uuid.uuid4().hex[:8]}"


def commit(folder: Path, step: int, metadata: dict[str, Any]) -> Manifest:
    """Add manifest and marker to a local folder with a payload, and flush them to the disk.

    Args:
        folder: Holds the payload and nothing else.
        step: Optimiser steps taken.
        metadata: Further fields of the :class:`Manifest`, by name.

    Returns:
        The manifest.

    Raises:
        NonFiniteError: If a weight or a moment is not finite.
    """
    broken = non_finite_tensor(folder)
    if broken is not None:
        raise NonFiniteError(
            f"the checkpoint of step {step} is refused: '{broken}' has values that are infinite "
            "or not a number; resume from an earlier one"
        )
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        files[path.relative_to(folder).as_posix()] = {"bytes": size, "sha256": digest}
        fsync(path)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = Manifest(step=step, files=files, finite=True, created=created, **metadata)

    text = json.dumps(asdict(manifest), indent=1).encode()
    for name, contents in (
        (MANIFEST_FILE, text),
        (MARKER_FILE, hashlib.sha256(text).hexdigest().encode()),
    ):
        (folder / name).write_bytes(contents)
        fsync(folder / name)
        fsync(folder)
    return manifest


@contextmanager
def committed(
    folder: Path, step: int, write: Callable[[Path], None], metadata: dict[str, Any]
) -> Iterator[Manifest]:
    """Write and commit a checkpoint under a temporary name, to be renamed or uploaded within.

    Args:
        folder: The temporary name; what is still there at the end is removed.
        step: Optimiser steps taken.
        write: Writes the payload into the empty folder that it is given.
        metadata: Further fields of the :class:`Manifest`, by name.

    Yields:
        The manifest of what is now whole and on the disk.

    Raises:
        NonFiniteError: If a weight or a moment is not finite.
    """
    folder.mkdir(parents=True)
    try:
        write(folder)
        yield commit(folder, step, metadata)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_manifest(fs: AbstractFileSystem, folder: str) -> Manifest:
    """Read the manifest of a committed checkpoint.

    Args:
        fs: The file system.
        folder: The checkpoint's folder in it.

    Returns:
        The manifest.

    Raises:
        UserError: If there is no marker, or marker and manifest do not fit.
    """
    try:
        marker = fs.cat_file(f"{folder}/{MARKER_FILE}")
        text = fs.cat_file(f"{folder}/{MANIFEST_FILE}")
    except FileNotFoundError as error:
        name = MANIFEST_FILE if MANIFEST_FILE in str(error) else MARKER_FILE
        raise UserError(f"{folder} is no complete checkpoint: it has no {name}") from None
    if hashlib.sha256(text).hexdigest().encode() != marker.strip():
        raise UserError(f"{folder}/{MANIFEST_FILE} is damaged: its SHA-256 is not in {MARKER_FILE}")
    try:
        manifest = Manifest(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}/{MANIFEST_FILE} is of another version: {error}") from None
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{folder}/{MANIFEST_FILE} names a file outside of its folder: {name}")
    return manifest


def verify_files(fs: AbstractFileSystem, folder: str, manifest: Manifest) -> None:
    """Compare the files of a checkpoint with its manifest.

    Args:
        fs: The file system.
        folder: The checkpoint's folder in it.
        manifest: The manifest.

    Raises:
        UserError: If a file is missing or differs; the first such file is named.
    """
    for name, expected in manifest.files.items():
        path = f"{folder}/{name}"
        try:
            size = fs.size(path)
            if size != expected["bytes"]:
                raise UserError(
                    f"{path} is damaged: it has {size} bytes, the manifest says {expected['bytes']}"
                )
            with fs.open(path, "rb") as file:
                digest = hashlib.sha256()
                while block := file.read(1 << 22):
                    digest.update(block)
        except FileNotFoundError:
            raise UserError(f"{path} is missing, and the manifest lists it") from None
        if digest.hexdigest() != expected["sha256"]:
            raise UserError(
                f"{path} is damaged: its SHA-256 begins with {digest.hexdigest()[:12]}, the "
                f"manifest says {expected['sha256'][:12]}"
            )


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
        return sorted(infos, key=lambda info: (info.manifest.lineage, info.manifest.step, info.key))

    def marked(self) -> "list[str]":
        """Return the keys with a commit marker, whether or not their checkpoints are whole."""
        keys = self._keys()
        return [key for key in keys if self.fs.exists(f"{self.root}/{key}/{MARKER_FILE}")]

    def save(
        self, step: int, write: Callable[[Path], None], metadata: dict[str, Any]
    ) -> CheckpointInfo:
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
        return sorted(name for name in names if _KEY.fullmatch(name))

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
