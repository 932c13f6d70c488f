"""Writes what drills have shown to ``docs/drills``: a pytest plugin, used by ``make drills`` only.

A drill is a set of test files. Tests say what they have counted with pytest's own
``record_property``; this plugin adds the outcomes and where they belong: date, commit, machine and
versions. One table a drill, and ``drills.jsonl`` with a line for each of all runs.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from results import provenance, table

FOLDER = Path(__file__).resolve().parents[1] / "docs/drills"
DRILLS = {
    "crash_points": (
        "A process dies before or after each storage call; the next start goes on with what was "
        "committed.",
        ["checkpoints/test_crash_points"],
    ),
    "kills": (
        "A run is killed by SIGKILL at random moments and started again by the supervisor; its "
        "last weights are those of an undisturbed run, bit for bit.",
        ["launch/test_kills"],
    ),
    "restarts": (
        "Ranks die under torchrun, and a job of two nodes meets its time limit under stand-ins for "
        "SLURM's commands; crash loops end with a report.",
        [
            "launch/test_torchrun",
            "launch/test_slurm",
            "launch/test_supervise",
            "launch/test_restarts",
        ],
    ),
    "storage_faults": (
        "An S3 server behind a network that fails; credentials that expire; folders that go.",
        ["checkpoints/test_mirror", "checkpoints/test_credentials", "faults/test_storage_faults"],
    ),
    "guards": (
        "Each guard is taken out, and the test that causes its fault must fail; what one process "
        "meets, all avoid.",
        ["faults/test_guards", "faults/test_guard_ranks"],
    ),
    "rollbacks": (
        "Numbers that are not finite, spikes and corrupt data, in steps, weights and moments; the "
        "run goes on as one that never met them.",
        ["faults/test_nan_rollback", "faults/test_rollback_meets"],
    ),
    "false_alarms": (
        "A healthy run through warm-up, a change of stage, one of context and decay: no alarm.",
        ["faults/test_false_alarms"],
    ),
}
_reports: dict[str, list[pytest.TestReport]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Sort what a test has come to under its drill."""
    file = report.nodeid.partition(".py::")[0].removeprefix("tests/")
    for name, (_, files) in DRILLS.items():
        if file in files and (report.when == "call" or not report.passed):
            _reports.setdefault(name, []).append(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the drills that ran; where tests run in several processes, the first one does."""
    if hasattr(session.config, "workerinput"):
        return
    origin = provenance()
    for name, reports in _reports.items():
        write(FOLDER, name, origin, figures(reports))


def figures(reports: list[pytest.TestReport]) -> dict[str, Any]:
    """What the tests of a drill amount to."""
    counts = {
        outcome: sum(report.outcome == outcome for report in reports)
        for outcome in ("passed", "failed", "skipped")
    }
    verdict = "failed" if counts["failed"] else "passed" if counts["passed"] else "not run"
    properties = {key: value for report in reports for key, value in report.user_properties}
    seconds = round(sum(report.duration for report in reports), 1)
    failed = [report.nodeid for report in reports if report.failed]
    return {"verdict": verdict, **counts, "seconds": seconds, **properties, "failures": failed}


def write(folder: Path, name: str, origin: dict[str, str], seen: dict[str, Any]) -> None:
    """Append a line to the log of all drills, and write the page of this one anew.

    Args:
        folder: Of the pages.
        name: Of the drill, a key of ``DRILLS``.
        origin: What the figures belong to.
        seen: The figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "drills.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"drill": name} | origin | seen) + "\n")
    about, files = DRILLS[name]
    rows = [{"": key, name: _text(value)} for key, value in (origin | seen).items()]
    tests = ", ".join(f"`tests/{file}.py`" for file in files)
    text = f"# {name}\n\n{about}\n\n{table(rows)}\nTests: {tests}.\n"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)
