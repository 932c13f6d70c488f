"""What `make drills` writes."""

import json
from types import SimpleNamespace

import pytest
from launch_parts import ROOT


@pytest.fixture
def drill_report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import drill_report

    monkeypatch.setattr(drill_report, "_reports", {})
    return drill_report


def outcome(test, outcome="passed", when="call", **properties):
    return SimpleNamespace(
        nodeid=f"tests/{test}",
        outcome=outcome,
        passed=outcome == "passed",
        failed=outcome == "failed",
        when=when,
        duration=1.5,
        user_properties=list(properties.items()),
    )


def test_a_drill_is_its_tests_and_what_they_counted(drill_report, tmp_path, monkeypatch):
    for report in (
        outcome("launch/test_kills.py::test_a", when="setup"),
        outcome("launch/test_kills.py::test_a", kills=100, moments={"saving": 50, "any": 50}),
        outcome("launch/test_slurm.py::test_b", "failed"),
        outcome("launch/test_slurm.py::test_c", "skipped", when="setup"),
        outcome("model/test_decoder.py::test_d"),
    ):
        drill_report.pytest_runtest_logreport(report)
    session = SimpleNamespace(config=SimpleNamespace())
    monkeypatch.setattr(drill_report, "FOLDER", tmp_path)
    drill_report.pytest_sessionfinish(session)
    rows = [json.loads(line) for line in (tmp_path / "drills.jsonl").read_text().splitlines()]
    kills, restarts = rows
    assert (kills["drill"], kills["verdict"], kills["kills"]) == ("kills", "passed", 100)
    assert (restarts["drill"], restarts["verdict"]) == ("restarts", "failed")
    assert (restarts["failed"], restarts["skipped"], restarts["passed"]) == (1, 1, 0)
    assert {"date", "commit", "machine", "python", "torch"} <= kills.keys()
    page = (tmp_path / "kills.md").read_text()
    assert "| kills | 100 |" in page
    assert "| moments | saving 50, any 50 |" in page
    assert "tests/launch/test_slurm.py::test_b" in (tmp_path / "restarts.md").read_text()


def test_every_file_of_a_drill_is_there(drill_report):
    for _, files in drill_report.DRILLS.values():
        for file in files:
            assert (ROOT / f"tests/{file}.py").is_file(), file
