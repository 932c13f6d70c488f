"""Starts of a run that a launcher repeats by itself: counted, and stopped when they lead nowhere.

torchrun (by ``launch/slurm.sbatch`` on a cluster) and ``launch/supervise.py`` start a command again
when it dies. Progress is a newer checkpoint or a later log row than any before. ``attempts.json``
in the run folder has the number of starts in a row without any, so the count outlives machines; a
new launch begins it anew. ``heartbeat.json`` says which data is being read, for the report.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from smol.errors import UserError

CRASHES = 3  # in a row without progress, after which a run is not started again
ATTEMPTS, HEARTBEAT, REPORT = "attempts.json", "heartbeat.json", "crash_report.txt"
SUPERVISED = "SMOL_SUPERVISED"  # set by launch/supervise.py, which counts by itself
TERMINATED = 143  # the exit status after SIGTERM and a checkpoint, as a shell reports it
LAST_EVENTS = 20  # in the report


def launcher() -> str | None:
    """What starts this command again when it dies, the same at each of its starts.

    Returns:
        A name; None where a person has started it, also by a torchrun that starts nothing again,
        or the supervisor, which counts by itself.
    """
    if SUPERVISED in os.environ or not _torchrun_restarts():
        return None
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name == "none":  # as all are named that have no rendezvous of several machines
        name = f"process {os.getppid()}"
    return None if name is None else f"torchrun {name}"


def _torchrun_restarts() -> bool:
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def progress(run_folder: Path) -> tuple[int, int, int]:
    """Lineage and step of the newest checkpoint, and the step of the last row of the log."""
    from smol.checkpoints.store import FsspecStore
    from smol.runs import CHECKPOINTS

    infos = FsspecStore(run_folder / CHECKPOINTS).list()
    lineage, step = (infos[-1].manifest.lineage, infos[-1].manifest.step) if infos else (0, 0)
    metrics = run_folder / "metrics.csv"
    rows = metrics.read_text().splitlines()[1:] if metrics.exists() else []
    logged = rows[-1].split(",")[0] if rows else ""
    return lineage, step, int(logged) if logged.isdigit() else 0


@dataclass
class Attempts:
    """How often a launcher has started a run in a row without progress.

    Attributes:
        launcher: Which one.
        best: The furthest that the run has come, as :func:`progress` says.
        crashes: Starts since then that have died.
        deaths: What the heartbeat said at each of them; empty if it died before its first step.
    """

    launcher: str
    best: tuple[int, ...]
    crashes: int = 0
    deaths: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def count(cls, run_folder: Path, launcher: str) -> "Attempts":
        """Count the start that is about to happen; call it once before each.

        A start that has ended as it was asked to is no crash, however far it has come.
        """
        reached, death = progress(run_folder), _read(run_folder / HEARTBEAT)
        attempts = cls._known(_read(run_folder / ATTEMPTS), launcher)
        if attempts is None or reached > attempts.best:
            attempts = cls(launcher, reached)
        elif not death.get("terminated"):
            attempts.crashes += 1
            attempts.deaths = [*attempts.deaths, death][-CRASHES:]
        run_folder.mkdir(parents=True, exist_ok=True)
        (run_folder / HEARTBEAT).unlink(missing_ok=True)
        written = run_folder / f".{ATTEMPTS}.{uuid4().hex}"  # two launches may write at once
        written.write_text(json.dumps(asdict(attempts)), encoding="utf-8")
        os.replace(written, run_folder / ATTEMPTS)
        return attempts

    @classmethod
    def _known(cls, found: dict[str, Any], launcher: str) -> "Attempts | None":
        """What is in the file; None if it is of another launcher, or of another version."""
        if found.get("launcher") != launcher:
            return None
        try:
            best = tuple(int(number) for number in found["best"])
            deaths = [death for death in found["deaths"] if isinstance(death, dict)]
            return cls(launcher, best, int(found["crashes"]), deaths)
        except (KeyError, TypeError, ValueError):
            return None


def refuse_crash_loop(run_folder: Path, ckpt_path: str | None) -> None:
    """Count a start of a launcher's, and end it if the ones before have led nowhere.

    Args:
        run_folder: Of the run.
        ckpt_path: What the command starts from.

    Raises:
        UserError: Too many have, and there is a report; or another start could not go on.
    """
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shares_store and _torchrun_restarts():
        # github.com/pytorch/pytorch/issues/135712: the next processes find the addresses of dead
        # ones in the store that they share with torchrun, and never meet.
        raise UserError(
            "torchrun --max-restarts cannot start processes again that share its store; type "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"
        )
    name = launcher()
    if name is None:
        return
    check_goes_on(ckpt_path)
    attempts = Attempts.count(run_folder, name)
    if attempts.crashes >= CRASHES:
        path = write_report(run_folder, attempts)
        raise UserError(f"{summary(run_folder, attempts)} Not started again; see {path}")


def check_goes_on(ckpt_path: str | None) -> None:
    """Make sure that a start goes on where the one before has ended.

    Raises:
        UserError: It does not.
    """
    if ckpt_path not in (None, "auto", "latest"):
        raise UserError(
            f"--ckpt_path is {ckpt_path}, and a launcher that starts a run again would return to "
            "it each time; type --ckpt_path auto, or start once without the launcher"
        )


def summary(run_folder: Path, attempts: Attempts) -> str:
    """One line: how often, and where."""
    said = f"The run {run_folder.name} crashed {attempts.crashes} times in a row without progress"
    places = list(dict.fromkeys(_place(death) for death in attempts.deaths))
    return f"{said}, {'each time ' if len(places) == 1 else ''}{'; '.join(places)}."


def write_report(run_folder: Path, attempts: Attempts, details: Iterable[str] = ()) -> Path:
    """Write down what is known of a crash loop.

    Args:
        run_folder: Of the run; the report is ``crash_report.txt`` in it.
        attempts: The count.
        details: Further lines.

    Returns:
        The path of the report.
    """
    lineage, step, logged = progress(run_folder)
    steps = {death.get("step") for death in attempts.deaths}
    same = len(steps) == 1 and None not in steps
    events = run_folder / "events.jsonl"
    rows = events.read_text(encoding="utf-8").splitlines() if events.exists() else []
    text = [
        summary(run_folder, attempts),
        f"launcher         {attempts.launcher}",
        f"last checkpoint  step {step}, lineage {lineage}",
        f"last log row     step {logged}",
        "",
        "what was being read at each death",
        *(f"  {line}" for death in attempts.deaths for line in _described(death)),
        "",
        "The same optimiser step each time: suspect its data, or what the step needs of memory."
        if same
        else "Not the same optimiser step each time: suspect the machine before the data.",
        "Once the cause is gone, launch the run again; a launch with another name (another",
        "process, SLURM job or --rdzv-id) is counted anew.",
        "",
        *details,
        "",
        "last events",
        *(f"  {row}" for row in rows[-LAST_EVENTS:]),
    ]
    path = run_folder / REPORT
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def _place(death: dict[str, Any]) -> str:
    if not death:
        return "before its first step"
    return f"in step {death['step']:,} at position {death['position']:,} of stage {death['stage']}"


def _described(death: dict[str, Any]) -> list[str]:
    if not death:
        return [_place(death)]
    sources = ", ".join(f"{name} {weight:g}" for name, weight in death["sources"].items())
    data = f"context {death['context']}, batch {death['global_batch']}, sources {sources}"
    return [f"{_place(death)}, at {death['time']}", f"  {data}"]


def _read(path: Path) -> dict[str, Any]:
    """A mapping from a JSON file; empty where a crash has left none or half of one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
