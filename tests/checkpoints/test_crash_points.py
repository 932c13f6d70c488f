"""A process that dies at any of its storage calls, and the next start."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np


def test_death_at_any_storage_call_costs_nothing_that_was_committed(tmp_path, record_property):
    """All points when DRILLS is set, else as many as take a few seconds."""
    script = [sys.executable, str(Path(__file__).with_name("crash_points.py"))]

    def run(folder, *points):
        command = [*script, str(tmp_path / folder), *map(str, points)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    number = int(run("count"))
    assert number > 500
    points = np.arange(number)
    if not os.environ.get("DRILLS"):
        points = np.random.default_rng(0).choice(points, 24, replace=False)
    record_property("points", len(points))
    assert run("points", *points).strip() == "{}"
