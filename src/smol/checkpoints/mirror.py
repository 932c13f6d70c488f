"""Copies local checkpoints to a store while training goes on, and keeps order in both."""

import random
import threading
import time
from collections import deque
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

from smol.checkpoints.fence import Fence, FencedError
from smol.checkpoints.retention import Retention, is_pinned, pin
from smol.checkpoints.store import CheckpointInfo, FsspecStore, order
from smol.errors import one_line


@dataclass(frozen=True)
class News:
    """What a mirror has to tell.

    Attributes:
        kind: ``uploaded``, ``upload_failed``, ``dropped`` or ``fenced``.
        message: One line for people.
        fields: Numbers and names for programs.
    """

    kind: str
    message: str
    fields: dict[str, Any]


class Mirror:
    """Makes the remote store what the retention rule says of both stores together.

    There is no queue to lose: a pass compares the two stores, uploads what the rule keeps and the
    remote one lacks, newest first, and removes what may go. So a pass also finishes what an earlier
    process has left. A checkpoint that was superseded before its turn is not uploaded. A pass that
    fails is repeated, with longer and longer pauses, for as long as the process lives.

    The thread only reads local files; they are removed by :meth:`prune_local`, in the thread that
    writes them. One is removed when its copy was read back from the store and found whole, or when
    the rule keeps enough newer ones; the newest stay in any case. A pin in either store keeps the
    remote copy; a pinned local one stays until its pin is in the remote store too.

    Args:
        local: Where checkpoints are written.
        remote: Where they are to be safe. No other store object may share its ``cache``.
        retention: What to keep; counts over both stores.
        spare: How many local copies to keep although they are safe, at least 1.
        waiting_bytes: Size of the local copies that may wait for their upload; beyond it the oldest
            are given up, but for the newest one, for two as long as nothing is safe, and for those
            that are pinned or protected. None for no limit.
        protected: Keys never to delete, such as the one that the run was resumed from.
        sound: Keys whose local copy was verified already.
        pause: Seconds before the first repetition, and at most before any.
    """

    def __init__(
        self,
        local: FsspecStore,
        remote: FsspecStore,
        retention: Retention | None = None,
        spare: int = 1,
        waiting_bytes: int | None = None,
        protected: Collection[str] = (),
        sound: Collection[str] = (),
        pause: tuple[float, float] = (2.0, 300.0),
    ):
        self.local, self.remote = local, remote
        self.retention = retention or Retention()
        self.spare, self.waiting_bytes, self.pause = max(1, spare), waiting_bytes, pause
        self.protected = frozenset(protected)
        self.fence = Fence(remote)
        self.fenced = False
        self.uploaded_bytes = 0
        self.failures = 0  # passes since the last that did not fail
        self._news: deque[News] = deque()
        self._changed = threading.Condition()  # guards what follows
        self._stored: dict[str, CheckpointInfo] = {}  # committed in the remote store
        self._verified: set[str] = set()  # keys read back from it
        self._pinned: set[str] = set()  # keys with a pin in both
        self._sound = set(sound)  # keys whose local copy is known to be whole
        self._lost: set[str] = set()  # keys whose local copy is not
        self._uploading: str | None = None
        self._asked = self._done = 0
        self._stopping = self._dirty = False
        self._thread: threading.Thread | None = None

    # -- called by the training ------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; it begins with a pass."""
        self._dirty = True
        self._thread = threading.Thread(target=self._run, name="checkpoint mirror", daemon=True)
        self.wake()
        self._thread.start()

    def wake(self, written: CheckpointInfo | None = None) -> None:
        """Ask for a pass, because a checkpoint was written."""
        with self._changed:
            if written is not None:
                self._sound.add(written.key)
            self._asked += 1
            self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait until everything written so far is in the remote store; return whether it is."""
        with self._changed:
            self._changed.wait_for(lambda: self.fenced or self._done >= self._asked, seconds)
            return not self.fenced and self._done >= self._asked

    def stop(self) -> None:
        """End the thread after what it is doing; the next start goes on with the rest."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def news(self) -> list[News]:
        """What has happened since the last call."""
        return [self._news.popleft() for _ in range(len(self._news))]

    @property
    def age_of_durable(self) -> float | None:
        """Seconds since the newest checkpoint in the remote store was written; None if none is."""
        with self._changed:
            newest = max(self._stored.values(), key=order, default=None)
        if newest is None:
            return None
        written = datetime.fromisoformat(newest.manifest.created)
        return max(0.0, (datetime.now(UTC) - written).total_seconds())

    def prune_local(self) -> None:
        """Remove the local copies that may go, and the oldest ones that wait beyond the budget."""
        if self.fenced:
            return
        with self._changed:
            infos = self.local.list()
            both = list((self._stored | {info.key: info for info in infos}).values())
            old = {i.key for i in self.retention.removable(both, self._is_sound, self._must_stay)}
            spare = {info.key for info in infos[-self.spare :]} | {self._uploading}
            safe = {i.key for i in infos if i.key in self._verified and not self._pins_alone(i)}
            gone = [i for i in infos if i.key not in spare and i.key in safe | old]
            waiting = [i for i in infos if i.key not in self._verified and i not in gone]
            gone += self._beyond_budget(waiting)
            for info in gone:
                with suppress(FileNotFoundError):  # somebody was faster
                    self.local.delete(info)

    def _beyond_budget(self, waiting: list[CheckpointInfo]) -> list[CheckpointInfo]:
        if self.waiting_bytes is None:
            return []
        dropped: list[CheckpointInfo] = []
        total = sum(info.manifest.bytes for info in waiting)
        least = 1 if self._verified else 2
        for info in waiting[:-least]:
            stays = info.key == self._uploading or self._must_stay(info)
            if total > self.waiting_bytes and not stays:
                dropped.append(info)
                total -= info.manifest.bytes
                message = f"{info.key} is given up: local copies that wait exceed the disk budget"
                self._tell("dropped", message, key=info.key, bytes=info.manifest.bytes)
        return dropped

    def _is_sound(self, info: CheckpointInfo) -> bool:
        """Whether a checkpoint is whole in either store; a local one is read if need be."""
        if info.key in self._verified or info.key in self._sound:
            return True
        if info.key in self._lost or not self._is_whole_locally(info):
            return False
        self._sound.add(info.key)
        return True

    def _must_stay(self, info: CheckpointInfo) -> bool:
        return info.key in self.protected or is_pinned(self.local, info.key)

    def _pins_alone(self, info: CheckpointInfo) -> bool:
        """Whether its only pin is the local one."""
        return info.key not in self._pinned and is_pinned(self.local, info.key)

    def _is_whole_locally(self, info: CheckpointInfo) -> bool:
        try:
            return self.local.is_sound(info)
        except OSError:
            return False

    # -- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            asked = self._asked
            pause = None
            try:
                self.run_once(asked)
                self.failures = 0
            except FencedError as error:
                with self._changed:
                    self.fenced = True
                    self._changed.notify_all()
                self._tell("fenced", str(error))
                return
            except Exception as error:  # every file system has errors of its own
                self.failures, self._dirty = self.failures + 1, True
                self._connect_anew()
                first, longest = self.pause
                pause = min(first * 2 ** min(self.failures - 1, 30), longest)
                pause *= random.uniform(0.5, 1.5)  # so that a thousand runs do not come at once
                if self.failures & (self.failures - 1) == 0:  # 1, 2, 4, 8, …
                    message = f"attempt {self.failures}: {one_line(error)}"
                    self._tell("upload_failed", message, attempts=self.failures)
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._asked > asked, pause)  # noqa: B023

    def _connect_anew(self) -> None:
        """Make the remote file system again: it may hold credentials that were renewed since.

        What expires by itself (instance profiles, web identities, ``credential_process``) botocore
        renews in time; keys in a file it reads once.
        """
        if not self.remote.is_local:
            fs = self.remote.fs
            fs.clear_instance_cache()
            self.remote.fs = type(fs)(*fs.storage_args, **fs.storage_options)

    def run_once(self, asked: int = 0) -> None:
        """Take one pass.

        Args:
            asked: Number of the request that it answers.

        Raises:
            FencedError: If another process writes to the remote store.
            Exception: Whatever the remote store raises; the next pass goes on.
        """
        if not self.fence.number:
            self.fence.claim()
        self._look()
        while (info := self._next()) is not None:
            try:
                self._upload(info)
            finally:
                self._uploading = None
        self._copy_pins()
        with self._changed:
            self._done = max(self._done, asked)
            self._changed.notify_all()
        self._remove()

    def _look(self) -> None:
        infos = {info.key: info for info in self.remote.list()}
        with self._changed:
            self._stored = infos

    def _next(self) -> CheckpointInfo | None:
        """Choose what to upload, and keep it from being removed meanwhile."""
        with self._changed:
            infos = self.local.list()
            both = list((self._stored | {info.key: info for info in infos}).values())
            whole = self.retention.removable(both, self._may_be_sound, self._must_stay)
            old = {info.key for info in whole}
            wanted = [
                i for i in infos if i.key not in self._stored and i.key not in self._lost | old
            ]
            if not wanted or self._stopping:
                return None
            self._uploading = wanted[-1].key
            return wanted[-1]

    def _may_be_sound(self, info: CheckpointInfo) -> bool:
        # Uploading tells for certain.
        return info.key not in self._lost

    def _upload(self, info: CheckpointInfo) -> None:
        began = time.monotonic()
        try:
            self.fence.check()
            if is_pinned(self.local, info.key):
                pin(self.remote, info.key)
            folder = Path(self.local.root, info.key)
            self.remote.upload(folder, info.key, info.manifest, self.fence.check)
        except FencedError:
            raise
        except Exception:
            if self._is_whole_locally(info):
                raise
            self._lost.add(info.key)
            message = f"{info.key} is not uploaded: its local copy is damaged or gone"
            self._tell("upload_failed", message, key=info.key)
            return
        with self._changed:
            self._stored[info.key] = info
            self._verified.add(info.key)
        self.uploaded_bytes += info.manifest.bytes
        seconds = time.monotonic() - began
        message = f"{info.key} is safe in {self.remote.root} after {seconds:.1f} s"
        fields = {"key": info.key, "bytes": info.manifest.bytes, "seconds": seconds}
        self._tell("uploaded", message, attempts=self.failures + 1, **fields)

    def _copy_pins(self) -> None:
        """Pin in the remote store what somebody has pinned locally since its upload."""
        pinned = {i.key for i in self.local.list() if is_pinned(self.local, i.key)}
        pinned &= self._stored.keys()
        for key in pinned:
            if not is_pinned(self.remote, key):
                self.fence.check()
                pin(self.remote, key)
        with self._changed:
            self._pinned = pinned

    def _remove(self) -> None:
        """Remove from the remote store what may go and what was interrupted."""
        if self._dirty:
            self.fence.check()
            self.remote.remove_leftovers()
            abort_multipart_uploads(self.remote.fs, self.remote.root)
            self._dirty = False
        infos = list(self._stored.values())
        for info in self.retention.removable(infos, self._is_whole_remotely, self._must_stay_there):
            self.fence.check()
            with suppress(FileNotFoundError):  # somebody was faster
                self.remote.delete(info)
            with self._changed:
                self._stored.pop(info.key, None)

    def _is_whole_remotely(self, info: CheckpointInfo) -> bool:
        if info.key not in self._verified:
            if not self.remote.is_sound(info):
                return False
            with self._changed:
                self._verified.add(info.key)
        return True

    def _must_stay_there(self, info: CheckpointInfo) -> bool:
        return self._must_stay(info) or is_pinned(self.remote, info.key)

    def _tell(self, kind: str, message: str, **fields: Any) -> None:
        self._news.append(News(kind, message, fields))


def abort_multipart_uploads(fs: AbstractFileSystem, root: str) -> int:
    """Abort what interrupted uploads to S3 have left, which is invisible and costs money.

    Args:
        fs: The file system; nothing happens if it is not one of s3fs.
        root: Bucket and prefix; uploads elsewhere are left alone.

    Returns:
        How many there were.
    """
    if not hasattr(fs, "call_s3"):
        return 0
    bucket, prefix, _ = fs.split_path(root)
    place = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
    number, page = 0, {"IsTruncated": True}
    while page.get("IsTruncated"):
        last = {f"{key}Marker": page.get(f"Next{key}Marker") for key in ("Key", "UploadId")}
        last = {name: value for name, value in last.items() if value}
        page = fs.call_s3("list_multipart_uploads", **place, **last)
        for upload in page.get("Uploads", []):
            what = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
            fs.call_s3("abort_multipart_upload", Bucket=bucket, **what)
            number += 1
    return number
