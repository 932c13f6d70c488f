"""One writer for a store: whoever came last."""

import json
import os
import socket
import uuid
from datetime import UTC, datetime
from time import sleep

from smol.checkpoints.store import FsspecStore
from smol.errors import UserError

WRITERS = "writers"
ATTEMPTS, PAUSE_SECONDS = 4, 0.1


class FencedError(UserError):
    """Another process has taken over the store, so this one must not write to it any more."""


class Fence:
    """A claim on a store, numbered; the highest number holds it.

    A claim is a small object ``writers/00000003.json`` that says who claimed, where and when. It is
    created only if it is not there: ``O_EXCL`` in a folder, ``If-None-Match: *`` on S3, so of two
    processes that start together one gets the higher number. A process that hangs and wakes up
    again, such as one that its scheduler took for dead, finds itself outnumbered. Numbers begin
    anew where the whole store was deleted, so a claim is known by its contents.

    Between a check and the write after it another process may claim; keys are never written twice,
    so two writers never mix within one checkpoint.

    Args:
        store: What is claimed.
    """

    def __init__(self, store: FsspecStore):
        self.store = store
        self.number = 0
        self._held = b""  # what the claim says
        self._identity = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "claim": uuid.uuid4().hex,
        }

    def claim(self) -> None:
        """Become the writer; whoever was it before is fenced out."""
        fs = self.store.fs
        if self.store.is_local:
            fs.makedirs(self._folder, exist_ok=True)
        time = datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps(self._identity | {"time": time}).encode()
        missing = 0
        while not self.number:
            number = max(self._claims(), default=0) + 1
            failure = None
            try:
                with fs.open(self._path(number), "xb") as file:
                    file.write(text)
            except Exception as error:  # each library has its own for "it is there already"
                failure = error
            try:
                found = fs.cat_file(self._path(number))
            except FileNotFoundError:
                # It may be refused to this process and not yet be there of another's.
                missing += 1
                if missing == ATTEMPTS:
                    raise failure or UserError(f"{self._path(number)} is gone again") from None
                sleep(PAUSE_SECONDS * missing)
                continue
            if found == text:  # also where the answer to the write was lost on its way
                self.number, self._held = number, text

    def check(self) -> None:
        """Make sure that this process is still the writer.

        Raises:
            FencedError: If another one has claimed the store since.
        """
        claims = self._claims()
        if not claims:  # somebody deleted the whole folder
            self.number = 0
            self.claim()
        elif (holder := self.store.fs.cat_file(self._path(max(claims)))) != self._held:
            who = holder.decode(errors="replace") or "it did not say who it is"
            raise FencedError(
                f"another process has taken over {self.store.root}, so this one stops writing "
                f"there: {who}"
            )

    @property
    def _folder(self) -> str:
        return f"{self.store.root}/{WRITERS}"

    def _path(self, number: int) -> str:
        return f"{self._folder}/{number:08d}.json"

    def _claims(self) -> list[int]:
        fs = self.store.fs
        fs.invalidate_cache()
        try:
            names = [path.rpartition("/")[2] for path in fs.ls(self._folder, detail=False)]
        except FileNotFoundError:
            return []
        return [int(name[:-5]) for name in names if name[:-5].isdigit() and name.endswith(".json")]
