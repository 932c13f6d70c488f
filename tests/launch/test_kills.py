"""A run that is killed again and again, at any moment of its life, under the supervisor."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from faulty_proxy import FaultyProxy
from launch_parts import SUPERVISE, assert_equal, final_weights, fit, run, write_config
from object_store import BUCKET

from smol.checkpoints.replicas import RemoteRuns

SEED = 0
KILLS = 100 if "DRILLS" in os.environ else 4
MOMENTS = ("saving", "uploading", "training", "any")


class Killer(threading.Thread):
    """Sends SIGKILL to what a supervisor has started, so many times.

    The moments take turns: while a checkpoint is written to the disk; in one of the requests of an
    upload, its verification or a removal; in a step; and any, starting and stopping included.

    Args:
        supervisor: Its process.
        folder: The run folder.
        proxy: Between the run and its store.
        kills: How many.
    """

    def __init__(self, supervisor: subprocess.Popen, folder: Path, proxy: FaultyProxy, kills: int):
        super().__init__(daemon=True)
        self.supervisor, self.folder, self.proxy, self.kills = supervisor, folder, proxy, kills
        self.rng = np.random.default_rng(SEED)
        self.killed: list[str] = []
        self.starting = 5.0  # seconds to the first step, as far as is known
        self._dead: set[int] = set()

    def run(self) -> None:
        while len(self.killed) < self.kills and (child := self._new_child()) is not None:
            moment = MOMENTS[len(self.killed) % len(MOMENTS)]
            getattr(self, f"_wait_{moment}")()
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
                self._dead.add(child)
                self.killed.append(moment)

    def _new_child(self) -> int | None:
        path = Path(f"/proc/{self.supervisor.pid}/task/{self.supervisor.pid}/children")
        while self.supervisor.poll() is None:
            with suppress(OSError):
                for child in map(int, path.read_text().split()):
                    if child not in self._dead:
                        return child
            time.sleep(0.005)
        return None

    def _wait_any(self) -> None:
        time.sleep(self.rng.uniform(0, 1.2 * self.starting))

    def _wait_training(self) -> None:
        began = time.monotonic()
        self._until(lambda: self._heartbeat() > began)
        self.starting = time.monotonic() - began
        time.sleep(self.rng.uniform(0, 0.2))

    def _wait_saving(self) -> None:
        before = set(self.folder.glob("checkpoints/.staging-*"))
        self._until(lambda: set(self.folder.glob("checkpoints/.staging-*")) - before)
        time.sleep(self.rng.uniform(0, 0.01))

    def _wait_uploading(self) -> None:
        first = len(self.proxy.requests)
        number = first + int(self.rng.integers(1, 60))
        self._until(lambda: len(self.proxy.requests) > number)

    def _heartbeat(self) -> float:
        """When the last optimiser step began, by the monotonic clock."""
        with suppress(OSError):
            return time.monotonic() - time.time() + (self.folder / "heartbeat.json").stat().st_mtime
        return 0.0

    def _until(self, condition) -> None:
        while self.supervisor.poll() is None and not condition():
            time.sleep(0.0005)


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.timeout(4 * 3600)
def test_a_run_that_is_killed_at_random_ends_with_the_weights_of_one_that_was_not(
    sources, s3, tmp_path, record_property
):
    steps = 40 + 12 * KILLS
    done = run([sys.executable, *fit(write_config(tmp_path, "whole", sources, steps))], 3600)
    assert done.returncode == 0, done.stderr[-2000:]

    proxy, folder = FaultyProxy(s3.port), tmp_path / "runs/killed"
    options = s3.storage_options | {"client_kwargs": {"endpoint_url": proxy.url}}
    remote = RemoteRuns(f"s3://{BUCKET}/{tmp_path.name}", options)
    checkpoint = "--callbacks.checkpoint.init_args"
    config = write_config(tmp_path, "killed", sources, steps)
    flags = [f"{checkpoint}.store", remote.url, f"{checkpoint}.storage_options"]
    flags += [json.dumps(options)]
    command = [sys.executable, str(SUPERVISE), "--backoff", "0", "--crashes", "1000"]
    with open(tmp_path / "log", "w") as log:
        supervisor = subprocess.Popen(
            [*command, *fit(config, *flags)], stdout=log, stderr=subprocess.STDOUT
        )
    killer = Killer(supervisor, folder, proxy, KILLS)
    killer.start()
    status = supervisor.wait()
    killer.join(10)
    assert status == 0, (tmp_path / "log").read_text()[-2000:]
    assert len(killer.killed) == KILLS
    rows = [json.loads(line) for line in (folder / "supervise.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == [-signal.SIGKILL] * KILLS + [0]
    assert_equal(final_weights(folder), final_weights(tmp_path / "runs/whole"))
    safe = remote.of("killed")
    for info in safe.list():
        safe.verify(info)
    assert safe.list()[-1].manifest.step == steps
    proxy.stop()
    assert not list(folder.glob("checkpoints/.staging-*"))
    record_property("seed", SEED)
    record_property("kills", KILLS)
    record_property("moments", dict(Counter(killer.killed)))
    record_property("steps", steps)
