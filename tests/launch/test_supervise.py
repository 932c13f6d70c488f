"""The supervisor: what it starts again, what not, and when it gives up."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from launch_parts import SUPERVISE

CONFIG = """
name: tried
runs_dir: {runs}
"""


def supervise(folder, script, *options, **kwargs):
    """Supervise a stand-in for train.py that notes each of its starts."""
    (folder / "config.yaml").write_text(CONFIG.format(runs=folder / "runs"))
    (folder / "train.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        "starts = folder / 'starts'\n"
        "starts.write_text((starts.read_text() if starts.exists() else '') + 'x')\n"
        "number = len(starts.read_text())\n"
        "rows = folder / 'runs/tried/metrics.csv'\n"
        "rows.parent.mkdir(parents=True, exist_ok=True)\n"
        "def log(step): rows.write_text(f'step,loss\\n{step},1.0\\n')\n" + script
    )
    line = [sys.executable, str(SUPERVISE), "--backoff", "0.01", *options, str(folder / "train.py")]
    line += ["fit", "--config", str(folder / "config.yaml")]
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def end(process, seconds=60):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def starts(folder):
    return len((folder / "starts").read_text())


def test_a_command_that_is_killed_is_started_again_until_it_ends(tmp_path):
    script = "log(number)\nif number < 5: os.kill(os.getpid(), signal.SIGKILL)\n"
    status, out, _ = end(supervise(tmp_path, script))
    assert (status, starts(tmp_path)) == (0, 5)
    assert "SIGKILL after step 4" in out
    rows = (tmp_path / "runs/tried/supervise.jsonl").read_text().splitlines()
    assert [json.loads(row)["status"] for row in rows] == [-9] * 4 + [0]


def test_a_mistake_of_the_user_is_not_repeated(tmp_path):
    status, _, err = end(supervise(tmp_path, "print('error: no', file=sys.stderr); sys.exit(2)\n"))
    assert (status, starts(tmp_path)) == (2, 1)
    assert err == "error: no\n"


def test_crashes_without_progress_end_in_a_report(tmp_path):
    script = "log(min(number, 3)); print('out of luck', file=sys.stderr); sys.exit(1)\n"
    status, _, err = end(supervise(tmp_path, script, "--crashes", "2"))
    assert status == 3
    assert starts(tmp_path) == 5  # three that came further, two that did not
    report = (tmp_path / "runs/tried/crash_report.txt").read_text()
    assert "crashed 2 times in a row" in report
    assert "last log row     step 3" in report
    assert "out of luck" in report
    assert "crash_report.txt" in err.splitlines()[-1]


def test_somebody_who_asks_it_to_stop_is_heard(tmp_path):
    script = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "(folder / 'ready').touch()\n"
        "time.sleep(60)\n"
    )
    process = supervise(tmp_path, script)
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 143
    assert starts(tmp_path) == 1


def test_a_command_that_was_asked_to_stop_by_others_is_not_started_again(tmp_path):
    status, _, _ = end(supervise(tmp_path, "sys.exit(143)\n"))
    assert (status, starts(tmp_path)) == (143, 1)


def test_what_may_pass_by_itself_is_tried_again_as_after_a_crash(tmp_path):
    status, _, _ = end(supervise(tmp_path, "if number < 3: sys.exit(75)\n"))
    assert (status, starts(tmp_path)) == (0, 3)
    status, _, _ = end(supervise(tmp_path, "sys.exit(75)\n"))
    assert (status, starts(tmp_path)) == (3, 6)


def test_what_a_dead_command_leaves_behind_ends_with_it(tmp_path):
    script = (
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '300'])\n"
        "(folder / 'child').write_text(str(child.pid))\n"
        "if number == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "child.kill()\n"
    )
    process = supervise(tmp_path, "log(number)\n" + script)
    first = None
    while process.poll() is None:
        if first is None and (tmp_path / "child").exists():
            first = (tmp_path / "child").read_text()
        time.sleep(0.02)
    assert end(process)[0] == 0
    state = Path(f"/proc/{first}/stat")
    assert not state.exists() or state.read_text().split()[2] in "ZX"


def test_a_run_without_a_name_is_one_line(tmp_path):
    (tmp_path / "none.yaml").write_text("runs_dir: runs\n")
    line = [
        sys.executable,
        str(SUPERVISE),
        "src/train.py",
        "fit",
        "-c",
        str(tmp_path / "none.yaml"),
    ]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the run has no name")
