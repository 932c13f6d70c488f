"""The checkpoints of a run wherever copies of them are: reading, and falling back."""

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smol.checkpoints.store import MARKER_FILE, CheckpointInfo, FsspecStore, order
from smol.errors import TemporaryError, UserError, one_line
from smol.paths import resolve

log = logging.getLogger(__name__)

ATTEMPTS = 3  # at reading from a remote store, where an error may be one of the network alone


@dataclass(frozen=True)
class RemoteRuns:
    """Where the checkpoints of all runs are safe, each under the name of its run.

    Args:
        url: Path or fsspec URL of a folder, such as ``s3://bucket/runs``.
        storage_options: Of the file system, such as endpoint and keys of an S3 server.
    """

    url: str
    storage_options: dict[str, Any] | None = None

    def of(self, run: str, cache: str | Path | None = None) -> FsspecStore:
        """The store of one run; downloads go to ``cache``."""
        return FsspecStore(
            f"{str(resolve(self.url)).rstrip('/')}/{run}", cache, self.storage_options
        )


class Replicas:
    """A run's checkpoints in its local store and, where there is one, in the remote one.

    Args:
        local: In the run folder. What is downloaded becomes a checkpoint of this store.
        remote: Where they are safe, with the local store's folder as its cache; None for none.
        pause: Seconds between attempts at reading from the remote store.

    Attributes:
        complete: Whether the remote store, if there is one, could be listed.
    """

    def __init__(self, local: FsspecStore, remote: FsspecStore | None = None, pause: float = 1.0):
        self.local, self.remote, self.pause = local, remote, pause
        self.complete = True
        self._here: set[str] = set()
        self._there: set[str] = set()

    def list(self) -> list[CheckpointInfo]:
        """The committed checkpoints of both stores, in order of (lineage, step).

        Raises:
            TemporaryError: If the remote store cannot be read and there is no local checkpoint.
        """
        local = {info.key: info for info in self.local.list()}
        remote: dict[str, CheckpointInfo] = {}
        if self.remote is not None:
            try:
                remote = {info.key: info for info in self._insist(self.remote.list)}
            except Exception as error:  # every file system has errors of its own
                self.complete = False
                what = f"{self.remote.root} cannot be read: {one_line(error)}"
                if not local:
                    raise TemporaryError(
                        f"{what}; there is no local checkpoint either: try again, or begin anew "
                        "with --ckpt_path scratch"
                    ) from None
                log.warning("%s; only local checkpoints are considered", what)
        self._here, self._there = set(local), set(remote)
        return sorted((remote | local).values(), key=order)

    def is_remote(self, info: CheckpointInfo) -> bool:
        """Whether a checkpoint of :meth:`list` is in the remote store."""
        return info.key in self._there

    def marked(self) -> "list[str]":
        """The keys with a commit marker in either store, whether or not they are whole."""
        keys = set(self.local.marked())
        if self.remote is not None and self.complete:
            keys |= set(self._insist(self.remote.marked))
        return sorted(keys)

    def newest(
        self, infos: "list[CheckpointInfo] | None" = None
    ) -> tuple[CheckpointInfo, Path] | None:
        """Find the newest checkpoint that is whole, and download it if it is not here.

        Every one passed over is reported.

        Args:
            infos: What :meth:`list` returned, where the caller has called it.

        Returns:
            The checkpoint and its local folder; None if there is none.

        Raises:
            TemporaryError: There is none, and one could not be read.
        """
        unread = None
        for info in reversed(self.list() if infos is None else infos):
            try:
                return info, self.fetch(info)
            except UserError as error:
                log.warning("falling back to the checkpoint before %s: %s", info.key, error)
                unread = error if isinstance(error, TemporaryError) else unread
        if unread is not None:
            raise unread
        return None

    def fetch(self, info: CheckpointInfo) -> Path:
        """Return a local folder with a checkpoint of :meth:`list`, verified.

        Raises:
            UserError: If no copy of it is whole.
            TemporaryError: If none can be read.
        """
        if info.key in self._here:
            try:
                self.local.verify(info)
            except UserError as error:
                if info.key not in self._there:
                    raise
                log.warning("taking the copy in %s instead: %s", self.remote.root, error)
            else:
                return self.local.load_path(info)
        try:
            return self._insist(lambda: self._download(info))
        except UserError:
            raise
        except Exception as error:
            raise TemporaryError(f"{info.location} cannot be read: {one_line(error)}") from None

    def _download(self, info: CheckpointInfo) -> Path:
        from filelock import FileLock

        if self.remote.is_local:
            self.remote.verify(info)
            return self.remote.load_path(info)
        folder = Path(self.local.root)
        folder.mkdir(parents=True, exist_ok=True)
        # Of the processes on this machine the first one downloads.
        with FileLock(folder / ".download.lock"):
            target = folder / info.key
            try:
                if target.exists():
                    self.local.verify(info)
            except UserError:
                (target / MARKER_FILE).unlink(missing_ok=True)
                shutil.rmtree(target)
            return self.remote.load_path(info)

    def _insist(self, read: Any) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return read()
            except Exception:
                if attempt == ATTEMPTS:
                    raise
                time.sleep(self.pause * attempt)
        raise AssertionError("unreachable")
