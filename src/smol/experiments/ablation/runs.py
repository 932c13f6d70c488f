"""The runs of a study: each a process of its own, in a folder named by all that it depends on.

Folders lie together in ``runs/ablations/runs``, so that studies with the same baseline share its
runs, and a study that was interrupted finds what it has. ``ablation.json`` in one says how the run
has ended.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from smol.config import dump_yaml
from smol.data.card import write_json
from smol.errors import UserError
from smol.experiments.ablation.arms import Arm
from smol.paths import project_root
from smol.restarts import progress

RECORD, CONFIG, LOG = "ablation.json", "run.yaml", "train.log"
FINISHED, FAILED, STOPPED = "finished", "failed", "stopped"
ENDED_BY_SIGNAL = (130, 143, -2, -15)  # Ctrl-C and SIGTERM, caught or not
LOG_EVERY = 50  # steps, where trainer.log_every_n_steps is not set
NAME = 12  # characters of the digest
TRAINS = ("data", "losses", "model", "modules", "optim", "parallel")  # packages


@dataclass(frozen=True)
class Run:
    """One training run of a study.

    Attributes:
        arm: ``baseline`` or the variant.
        seed: Of initialisation and data order.
        folder: Where it is.
        source: Its configuration, interpolations kept.
    """

    arm: str
    seed: int
    folder: Path
    source: dict[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        """How it has ended: ``status``, ``seconds``, ``message``, ``made_by``; empty before."""
        try:
            return json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    @property
    def command(self) -> list[str]:
        """What trains it, from its own configuration file."""
        script = Path(sys.modules["smol"].__file__).parents[1] / "train.py"
        return [sys.executable, str(script), "fit", "--config", str(self.folder / CONFIG)]

    @property
    def status(self) -> str:
        return self.record.get("status", STOPPED if self.folder.exists() else "not begun")


def runs_of(arms: Iterable[Arm], seeds: Sequence[int], folder: Path) -> list[Run]:
    """All runs of a study, seed by seed, so that early results can already be compared.

    Args:
        arms: The baseline and the variants.
        seeds: Of each.
        folder: Of all ablations.
    """
    made = []
    for seed in seeds:
        for arm in arms:
            source, digest = arm.seeded(seed)
            name = digest[:NAME]
            run = {**source, "name": name, "runs_dir": str(folder / "runs")}
            made.append(Run(arm.name, seed, folder / "runs" / name, run))
    return made


class Executor(Protocol):
    """What runs are given to: a pool of threads, or submitit's executor."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future: ...


def train(run: Run, threads: int | None = None, devices: str | None = None) -> dict[str, Any]:
    """Train one run and write down how it ended; what is finished already is left alone.

    Args:
        run: Which one.
        threads: Of its process; None for what the machine gives.
        devices: Numbers of the GPUs that it sees; None for all.

    Returns:
        The record.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(run.folder / ".lock"):  # another study may share this run
        if run.status == FINISHED:
            return run.record
        (run.folder / CONFIG).write_text(dump_yaml(run.source), encoding="utf-8")
        # A run is alone on its machine: it shall not take the tasks of a SLURM job for its ranks.
        env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        env |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
        env |= {"CUDA_VISIBLE_DEVICES": devices} if devices is not None else {}
        before, began = run.record.get("seconds", 0.0), time.monotonic()
        with open(run.folder / LOG, "ab") as log:
            process = subprocess.Popen(
                run.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=project_root(),
                env=env,
            )
            _processes.add(process)
            try:
                code = process.wait()
            finally:
                _processes.discard(process)
        status, message = _ending(run, code)
        record = {
            "status": status,
            "message": message,
            "seconds": before + time.monotonic() - began,
            "made_by": {**made_by(), "threads": threads},
        }
        write_json(run.folder / RECORD, record)
        return record


def _ending(run: Run, code: int) -> tuple[str, str]:
    """How a run has ended, and why it is not finished."""
    if code in ENDED_BY_SIGNAL:
        return STOPPED, ""
    if code:
        return FAILED, f"{_last_line(run.folder / LOG)} (exit status {code})"
    trainer, (*_, logged) = run.source["trainer"], progress(run.folder)
    if logged <= trainer["max_steps"] - trainer.get("log_every_n_steps", LOG_EVERY):
        # Lightning ends a run that SIGTERM reaches, too, with status 0.
        return STOPPED, f"it ended at step {logged} of {trainer['max_steps']}"
    return FINISHED, ""


_processes: set[subprocess.Popen] = set()


class Pool(ThreadPoolExecutor):
    """``jobs`` runs at a time on this machine, which share its processors and GPUs evenly."""

    def __init__(self, jobs: int):
        super().__init__(jobs)
        cores = int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
        self.threads = max(1, cores // jobs)
        self._devices = _gpus(jobs)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        return super().submit(self._with_devices, function, *arguments)

    def _with_devices(self, function: Callable[..., Any], *arguments: Any) -> Any:
        devices = self._devices.pop() if self._devices else None
        try:
            return function(*arguments, self.threads, devices)
        finally:
            if devices is not None:
                self._devices.append(devices)

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:  # Ctrl-C, for one
            self.shutdown(wait=False, cancel_futures=True)
            for process in tuple(_processes):
                process.terminate()
        super().__exit__(kind, *rest)


def _gpus(jobs: int) -> list[str]:
    """The GPUs of each job; empty where all of them see all."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    names = visible.split(",")
    return [",".join(names[i::jobs]) for i in range(jobs)] if 1 < jobs <= count else []


def submitit_executor(folder: Path, name: str, slurm: dict[str, Any]) -> Executor:
    """Jobs of a SLURM cluster, one for each run, of one task on one machine.

    Args:
        folder: For submitit's own files; all machines see it.
        name: Of the jobs.
        slurm: Parameters of ``submitit.AutoExecutor``, such as ``timeout_min``.

    Raises:
        UserError: The package is missing, there is no SLURM, or a parameter is not known.
    """
    try:
        import submitit
    except ImportError:
        raise UserError(
            "--launcher submitit needs the package submitit, which is not installed; type "
            "pip install submitit, or --launcher local"
        ) from None
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
        executor.update_parameters(name=name, **slurm)
    except (RuntimeError, NameError, TypeError) as error:
        raise UserError(f"--launcher submitit: {' '.join(str(error).split())}") from None
    return executor


def carry_out(runs: Iterable[Run], executor: Executor, say: Callable[[str], None]) -> None:
    """Train runs and tell of each when it has ended."""
    waiting = {executor.submit(train, run): run for run in runs}
    ended = as_completed(waiting) if isinstance(executor, ThreadPoolExecutor) else waiting
    for number, job in enumerate(ended, 1):
        run, record = waiting[job], job.result()
        said = f"[{number}/{len(waiting)}] {run.arm}, seed {run.seed}: {record['status']}"
        why = f": {record['message']}" if record["message"] else ""
        say(f"{said} after {record['seconds']:,.0f} s{why}")


@cache
def made_by() -> dict[str, str]:
    """What a result may depend on besides its configuration: versions and processor."""
    import torch

    package = Path(sys.modules["smol"].__file__).parent
    digest = hashlib.sha256()
    for file in sorted(file for name in TRAINS for file in (package / name).rglob("*.py")):
        digest.update(file.read_bytes())
    return {
        "code": digest.hexdigest()[:NAME],
        "torch": torch.__version__,
        "processor": _processor(),
    }


def _processor() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} processors ({platform.machine()})"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    mistakes = [line for line in said[-20:] if line.startswith("error: ")]
    return (mistakes or said or [""])[-1].removeprefix("error: ")
