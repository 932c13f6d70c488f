"""The writing side of a run's checkpoints: save here, bring to safety there, keep the newest."""

import time
from pathlib import Path
from typing import Any

from smol.checkpoints.fence import Fence, FencedError
from smol.checkpoints.manifest import Write
from smol.checkpoints.mirror import Mirror, News
from smol.checkpoints.retention import Retention, is_pinned, pin
from smol.checkpoints.store import CheckpointInfo, FsspecStore


class Rotation:
    """Saves into a local store, mirrors it to a remote one if there is one, and removes the old.

    Args:
        local: Where checkpoints are written.
        remote: Where they are to be safe; None for nowhere else.
        retention: What to keep.
        spare: How many local copies to keep although they are safe, at least 1.
        waiting_bytes: Size of the local copies that may wait for their upload.
        resumed: Folder of the checkpoint that the run was resumed from, which stays; it was
            verified then.
    """

    def __init__(
        self,
        local: FsspecStore,
        remote: FsspecStore | None = None,
        retention: Retention | None = None,
        spare: int = 1,
        waiting_bytes: int | None = None,
        resumed: str | Path | None = None,
    ):
        self.local, self.retention = local, retention or Retention()
        self.protected = frozenset({Path(resumed).name} if resumed is not None else ())
        here = resumed is not None and Path(resumed).resolve().parent == Path(local.root).resolve()
        sound = self.protected if here else ()
        self.fence = Fence(local)
        self.mirror: Mirror | None = None
        if remote is not None:
            self.mirror = Mirror(
                local, remote, self.retention, spare, waiting_bytes, self.protected, sound
            )
        self._fenced = False
        self._sound = set(sound)  # keys written or verified by this process
        self._news: list[News] = []

    @property
    def fenced(self) -> bool:
        """Whether another process writes to one of the stores; this one does not any more."""
        return self._fenced or (self.mirror is not None and self.mirror.fenced)

    def begin(self) -> None:
        """Become the writer, and go on with what an earlier process has left."""
        self.fence.claim()
        if self.mirror is not None:
            self.mirror.start()

    def save(
        self,
        step: int,
        write: Write,
        metadata: dict[str, Any],
        pinned: bool = False,
    ) -> CheckpointInfo | None:
        """Save a checkpoint locally, ask for its upload, and remove what may go.

        Args:
            step: Optimiser steps taken.
            write: Writes the payload into the empty folder that it is given.
            metadata: Further fields of the manifest, by name.
            pinned: Keep it until somebody takes the pin away.

        Returns:
            The checkpoint; None if another process writes to the run.

        Raises:
            NonFiniteError: If a weight or a moment is not finite.
            OSError: If it cannot be written.
        """
        try:
            if not self.fenced:
                self.fence.check()
        except FencedError as error:
            self._fenced = True
            self._news.append(News("fenced", str(error), {}))
        if self.fenced:
            return None
        began = time.monotonic()
        info = self.local.save(step, write, metadata)
        seconds = time.monotonic() - began
        fields = {"key": info.key, "seconds": seconds, "pinned": pinned}
        self._news.append(News("saved", f"{info.key} in {seconds:.2f} s", fields))
        self._sound.add(info.key)
        if pinned:
            pin(self.local, info.key)
        if self.mirror is not None:
            self.mirror.wake(info)
        self._prune()
        return info

    def finish(self, seconds: float) -> None:
        """Wait until everything is in the remote store, but no longer than this."""
        if self.mirror is None:
            return
        if not self.mirror.flush(seconds) and not self.fenced:
            message = f"gave up after {seconds:g} s; the next start goes on with it"
            self._news.append(News("upload_failed", message, {}))
        self.mirror.stop()
        self._prune()

    def stop(self) -> None:
        """End the upload after what it is doing; the next start goes on with the rest."""
        if self.mirror is not None:
            self.mirror.stop()

    def news(self) -> list[News]:
        """What has happened since the last call."""
        news, self._news = self._news, []
        return news + (self.mirror.news() if self.mirror is not None else [])

    def _prune(self) -> None:
        try:
            if self.mirror is not None:
                self.mirror.prune_local()
                return
            infos = self.local.list()
            for info in self.retention.removable(infos, self._is_sound, self._must_stay):
                self.local.delete(info)
        except OSError as error:
            self._news.append(News("delete_failed", f"{type(error).__name__}: {error}", {}))

    def _must_stay(self, info: CheckpointInfo) -> bool:
        return info.key in self.protected or is_pinned(self.local, info.key)

    def _is_sound(self, info: CheckpointInfo) -> bool:
        if info.key not in self._sound and self.local.is_sound(info):
            self._sound.add(info.key)
        return info.key in self._sound
