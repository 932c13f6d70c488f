"""What a checkpoint is and of which bytes it consists, and the marker that commits it."""

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec import AbstractFileSystem

from smol.checkpoints.format import Digests, digest_of, fsync
from smol.errors import UserError

MANIFEST_FILE = "manifest.json"
MARKER_FILE = "COMMITTED"

Write = Callable[[Path], Digests | None]
"""Writes the payload of a checkpoint into the empty folder that it is given, and flushes it to the
disk. Of files that it returns the digests of, nobody need compute them again."""

_KEY = re.compile(r"step-\d{8,}-[0-9a-f]{8}")


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

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file["bytes"] for file in self.files.values())


def new_key(step: int) -> str:
    """Return a key that no other checkpoint has: ``step-00000120-<attempt>``."""
    return f"step-{step:08d}-{uuid.uuid4().hex[:8]}"


def is_key(name: str) -> bool:
    """Whether a name is the key of a checkpoint."""
    return _KEY.fullmatch(name) is not None


def commit(
    folder: Path, step: int, metadata: dict[str, Any], digests: Digests | None = None
) -> Manifest:
    """Add manifest and marker to a local folder with a payload, and flush them to the disk.

    Args:
        folder: Holds the payload and nothing else.
        step: Optimiser steps taken.
        metadata: Further fields of the :class:`Manifest`, by name.
        digests: Sizes and digests of files, where they are known.

    Returns:
        The manifest.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        files[name] = (digests or {}).get(name) or digest_of(path)
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
    folder: Path, step: int, write: Write, metadata: dict[str, Any]
) -> Iterator[Manifest]:
    """Write and commit a checkpoint under a temporary name, to be renamed or uploaded within.

    Args:
        folder: The temporary name; what is still there at the end is removed.
        step: Optimiser steps taken.
        write: Writes the payload into the empty folder that it is given.
        metadata: Further fields of the :class:`Manifest`, by name.

    Yields:
        The manifest of what is now whole and on the disk.
    """
    folder.mkdir(parents=True)
    try:
        digests = write(folder)
        yield commit(folder, step, metadata, digests)
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
