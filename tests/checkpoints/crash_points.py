"""Kills a process before or after any of its storage calls, starts it again, and looks.

python crash_points.py FOLDER [POINT …]   without points, prints how many there are

A point is a number: 2·n kills before the n-th storage call, 2·n + 1 after it. Calls are those of a
remote file system, and those of the local one that rename, remove or flush.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from smol.checkpoints.format import read_checkpoint, write_checkpoint
from smol.checkpoints.replicas import RemoteRuns, Replicas
from smol.checkpoints.retention import Retention
from smol.checkpoints.rotation import Rotation
from smol.checkpoints.store import FsspecStore
from smol.errors import UserError

DIED = 9
calls, fatal = 0, -1


def counted(function):
    def wrapper(*args, **kwargs):
        global calls
        number, calls = calls, calls + 1
        if fatal == 2 * number:
            os._exit(DIED)
        try:
            return function(*args, **kwargs)
        finally:
            if fatal == 2 * number + 1:
                os._exit(DIED)

    return wrapper


class Objects(AbstractFileSystem):
    """An object store: no folders, each call counted."""

    protocol = "objects"
    disk = LocalFileSystem(auto_mkdir=True)

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).removeprefix("objects://").rstrip("/")

    @counted
    def ls(self, path, detail=True, **kwargs):
        entries = [
            e for e in self.disk.ls(path, True) if e["type"] == "file" or self.disk.find(e["name"])
        ]
        return entries if detail else [entry["name"] for entry in entries]

    @counted
    def info(self, path, **kwargs):
        return self.disk.info(path)

    @counted
    def put_file(self, lpath, rpath, **kwargs):
        self.disk.put_file(lpath, rpath)

    @counted
    def get_file(self, rpath, lpath, **kwargs):
        self.disk.get_file(rpath, lpath)

    @counted
    def pipe_file(self, path, value, **kwargs):
        self.disk.pipe_file(path, value)

    @counted
    def rm_file(self, path):
        self.disk.rm_file(path)
        for folder in Path(path).parents:
            try:
                folder.rmdir()
            except OSError:
                break

    def rm(self, path, recursive=False, maxdepth=None):
        for file in sorted(self.find(path), reverse=True):  # the marker last, if it is there
            self.rm_file(file)

    @counted
    def _open(self, path, mode="rb", **kwargs):
        return self.disk.open(path, mode)


def stores(folder):
    local = FsspecStore(folder / "run/checkpoints")
    runs = RemoteRuns(f"objects://{folder}/remote")
    return local, runs.of("run"), Replicas(local, runs.of("run", folder / "run/checkpoints"), 0)


def train(folder, say, rounds=(3, 2)):
    """Rounds of restoring, saving and uploading; before each but the first the disk is lost."""
    for i, saves in enumerate(rounds):
        if i:
            shutil.rmtree(folder / "run")
            say("lost", 0)
        local, remote, replicas = stores(folder)
        found = replicas.newest()
        step = found[0].manifest.step if found else 0
        resumed = found[1] if found else None
        rotation = Rotation(local, remote, Retention(keep=2), resumed=resumed)
        rotation.fence.claim()
        for _ in range(saves):
            step += 1
            content = {"state_dict": {"w": torch.full((8,), float(step))}}
            info = rotation.save(step, lambda f, c=content: write_checkpoint(f, c), {})
            say("saved", step)
            rotation.mirror._dirty = True  # as after a start or a failure
            rotation.mirror.run_once()
            say("safe", step)
            rotation.mirror.prune_local()
            assert info is not None
            assert not rotation.fenced


def in_a_child(function, *args):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function(*args)
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def sound(store):
    """The steps of the checkpoints that are whole."""
    steps = set()
    for info in store.list():
        try:
            store.verify(info)
        except UserError:
            continue
        steps.add(info.manifest.step)
    return steps


def run_with(point, folder, journal):
    global fatal, calls
    fatal, calls = point, 0
    with open(journal, "a") as file:

        def say(what, step):
            file.write(f"{what} {step}\n")
            file.flush()

        train(folder, say)
    if point < 0:
        print(2 * calls)
        sys.stdout.flush()


def check(point, folder, lose_disk):
    """One crash, one restart."""
    journal = folder / "journal"
    assert in_a_child(run_with, point, folder, journal) == DIED, "it did not die"
    saved = safe = 0
    for line in journal.read_text().splitlines():
        what, step = line.split()
        saved = 0 if what == "lost" else int(step) if what == "saved" else saved
        safe = int(step) if what == "safe" else safe
    local, remote, _ = stores(folder)
    whole = sound(local) | sound(remote)
    assert len(whole) >= min(2, max(saved, safe)), f"{whole} are left of {saved}, {safe}"
    assert len(sound(remote)) >= min(2, safe)
    if lose_disk:
        shutil.rmtree(folder / "run", ignore_errors=True)
        saved = 0
    _, _, replicas = stores(folder)
    found = replicas.newest()
    step = found[0].manifest.step if found else 0
    assert step >= max(saved, safe), f"restored {step}, committed were {saved}, {safe}"
    if found:
        weights = read_checkpoint(found[1])["state_dict"]["w"]
        assert torch.equal(weights, torch.full((8,), float(step)))
    again = folder / "again"
    assert in_a_child(run_again, folder, again) == 0
    assert again.read_text().split() == [
        *(
            "saved",
            f"{step + 1}",
            "safe",
            f"{step + 1}",
            "saved",
            f"{step + 2}",
            "safe",
            f"{step + 2}",
        )
    ]
    # What was left is finished or gone.
    local, remote, _ = stores(folder)
    restored = {step} if step else set()
    assert {step + 2} <= sound(local) <= restored | {step + 2}, f"{sound(local)} here, {step}"
    assert sound(remote) == restored | {step + 1, step + 2}, f"{sound(remote)} there, {step}"
    for store in (local, remote):
        names = {path.rpartition("/")[2] for path in store.fs.ls(store.root, detail=False)}
        assert names - {"writers", ".download.lock"} == {info.key for info in store.list()}, names
    for info in remote.list():
        remote.verify(info)  # nothing half deleted counts


def run_again(folder, journal):
    with open(journal, "a") as file:
        train(folder, lambda what, step: file.write(f"{what} {step}\n"), rounds=[2])


def main():
    torch.set_num_threads(1)
    fsspec.register_implementation("objects", Objects)
    os.fsync = lambda descriptor: None  # what a process wrote outlives it; power cuts do not
    for name in ("rename", "fsync", "unlink", "remove", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    root, points = Path(sys.argv[1]).resolve(), [int(text) for text in sys.argv[2:]]
    if not points:
        (root / "whole").mkdir(parents=True)
        assert in_a_child(run_with, -1, root / "whole", root / "whole/journal") == 0
    failures = {}
    for point in points:
        for lose_disk in (False, True):
            folder = root / f"{point}-{lose_disk}"
            folder.mkdir(parents=True)
            try:
                check(point, folder, lose_disk)
            except (AssertionError, UserError) as error:
                failures[f"{point} {lose_disk}"] = str(error)
            else:
                shutil.rmtree(folder)
    if points:
        print(json.dumps(failures))


if __name__ == "__main__":
    main()
