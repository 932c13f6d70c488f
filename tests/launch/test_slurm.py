"""The batch script of a cluster, with stand-ins for SLURM's commands, and two nodes on one machine.

The stand-ins know what the script relies on: `srun` runs a command once per node and ends all when
one fails, `scancel --signal` reaches every process of what srun runs and not the batch script,
`scontrol requeue` is noted down.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_parts import (
    RANKS,
    ROOT,
    assert_equal,
    events,
    faults,
    final_weights,
    fit,
    run,
    write_config,
)
from warm_python import python

SCRIPT = ROOT / "launch/slurm.sbatch"
STEPS = 120
COMMANDS = {
    "srun": """
while [[ $1 == --* ]]; do shift; done
for node in $(seq "$SLURM_JOB_NUM_NODES"); do
    SLURM_NODEID=$((node - 1)) setsid "$@" &
    echo $! >> "$FAKE/nodes"
done
status=0
for node in $(seq "$SLURM_JOB_NUM_NODES"); do
    one=0; wait -n || one=$?
    if ((one)); then
        status=$one
        # --kill-on-bad-exit
        for pid in $(cat "$FAKE/nodes"); do kill -TERM -- "-$pid" 2> /dev/null; done
    fi
done
rm -f "$FAKE/nodes"
exit $status
""",
    "scontrol": """
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >> "$FAKE/scontrol"; fi
""",
    "scancel": """
echo "$@" >> "$FAKE/scancel"
signal() {
    for child in $(pgrep -P "$2"); do signal "$1" "$child"; done
    kill -s "$1" "$2" 2> /dev/null
}
for pid in $(cat "$FAKE/nodes"); do signal "${1#--signal=}" "$pid"; done
""",
}


class Cluster:
    """A job of two nodes.

    Args:
        folder: Of the stand-ins and of what they note.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir()
        for name, text in COMMANDS.items():
            (folder / "bin" / name).write_text("#!/bin/bash\n" + text)
            (folder / "bin" / name).chmod(0o755)

    def start(self, config: Path, *flags: str, attempt: int = 0, **kwargs) -> subprocess.Popen:
        """Start the job for the first time, or when it was queued again."""
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "FAKE": str(self.folder),
            "PYTHON": sys.executable,
            "PROCESSES_PER_NODE": "1",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[1-2]",
            # What Lightning takes for a launch by srun itself.
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "1",
            "SLURM_JOB_NAME": "smol",
            **({"SLURM_RESTART_COUNT": str(attempt)} if attempt else {}),
        }
        command = ["bash", str(SCRIPT), "--config", str(config), *flags]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment | kwargs,
        )

    def noted(self, command: str) -> list[str]:
        path = self.folder / command
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def end(process, seconds=200):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def wait_for(process, condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, end(process)
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_loses_a_rank_and_meets_its_time_limit_goes_on_as_if_it_had_not(
    cluster, sources, tmp_path
):
    """A rank is killed; then the signal comes that announces the end; then the job runs again."""
    flags = ("--trainer.strategy", "ddp", "--callbacks.checkpoint.every", "40")
    flags += ("--data.num_workers", "1")
    config = write_config(tmp_path, "whole", sources, STEPS)
    done = python(*fit(config, *RANKS, *flags), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]

    config = write_config(tmp_path, "job", sources, STEPS)
    kill = {"kind": "kill", "step": 45, "rank": 1}
    wait = {"kind": "slow_step", "step": STEPS - 50, "seconds": 20, "rank": None}  # for the signal
    folder = tmp_path / "runs/job"
    job = cluster.start(config, *flags, *faults(kill, wait))
    wait_for(job, lambda: len(events(folder, "start")) == 2)
    job.send_signal(signal.SIGUSR1)
    status, out, err = end(job)
    assert status == 0, err[-3000:]
    assert "is queued again" in out
    assert cluster.noted("scancel") == [f"--signal=TERM {os.getpid()}"]
    assert cluster.noted("scontrol") == [f"requeue {os.getpid()}"]
    (stopped,) = [step for _, step in events(folder, "terminated")]
    assert 40 <= stopped < STEPS
    assert events(folder, "saved")[-1] == ("saved", stopped)

    status, out, err = end(cluster.start(config, *flags, *faults(kill), attempt=1))
    assert status == 0, err[-3000:]
    assert events(folder, "start") == [("start", 0), ("start", 40), ("start", stopped)]
    assert_equal(final_weights(folder), final_weights(tmp_path / "runs/whole"))
    assert not list(folder.glob(".shared-*"))
    assert len(cluster.noted("scontrol")) == 1, "a job that ended is not queued again"


def test_a_mistake_is_told_before_any_node_is_asked(cluster, sources, tmp_path):
    config = write_config(tmp_path, "job", sources, STEPS)
    status, _, err = end(cluster.start(config, "--trainer.max_stepz", "3"))
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_that_a_node_does_not_see_ends_the_job(cluster, sources, tmp_path):
    hide = cluster.folder / "bin/srun"
    hide.write_text(hide.read_text().replace('setsid "$@"', 'rm -f "${@: -1}"; setsid "$@"'))
    config = write_config(tmp_path, "job", sources, STEPS)
    status, _, err = end(cluster.start(config))
    assert status == 2
    assert "does not see" in err
    assert err.splitlines()[-1].startswith(f"error: {tmp_path}/runs/job is not shared by all nodes")


@pytest.mark.parametrize(
    ("number", "status", "queued"), [(signal.SIGUSR1, 0, 1), (signal.SIGTERM, 143, 0)]
)
def test_a_signal_before_the_ranks_start_is_heard(
    cluster, sources, tmp_path, number, status, queued
):
    python = cluster.folder / "bin/slow_python"
    python.write_text(f'#!/bin/bash\ntouch "$FAKE/asked"\nsleep 1\necho {tmp_path}/runs/job\n')
    python.chmod(0o755)
    job = cluster.start(write_config(tmp_path, "job", sources, STEPS), PYTHON=str(python))
    wait_for(job, (cluster.folder / "asked").exists)
    job.send_signal(number)
    assert end(job)[0] == status
    assert cluster.noted("scontrol") == queued * [f"requeue {os.getpid()}"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    done = run(["shellcheck", SCRIPT])
    assert done.returncode == 0, done.stdout
