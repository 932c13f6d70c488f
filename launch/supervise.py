"""Keeps a training alive on one machine: ``python launch/supervise.py src/train.py fit -c FILE``.

The command is started again whenever it dies, and goes on from its newest checkpoint; each start is
a line in ``<run>/supervise.jsonl``. Waiting doubles from crash to crash and begins anew with
progress, which is a newer checkpoint or a later log row than any before. After so many crashes in a
row without progress the run stops with a report (exit status 3), instead of burning hours on the
same data. A command that ends by itself (0), with a mistake of the user's (2), or because somebody
asked for it (143; SIGTERM and SIGINT are passed on) is not started again.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from smol.errors import UserError
from smol.restarts import (
    CRASHES,
    SUPERVISED,
    TERMINATED,
    Attempts,
    check_goes_on,
    progress,
    summary,
    write_report,
)

ENDED, MISTAKE, GAVE_UP = 0, 2, 3
LAST_LINES = 20  # of the error output, in the report


def run_folder(command: Sequence[str]) -> Path:
    """The folder of the run that a command line trains, by its name and runs_dir.

    Raises:
        UserError: The command line is not one of train.py's, the run has no name, or each start
            would begin at the same place.
    """
    from smol.cli import parse_command_line
    from smol.config import compose
    from smol.interpolation import interpolate
    from smol.paths import resolve

    script = next((i for i, word in enumerate(command) if word.endswith("train.py")), None)
    if script is None:
        raise UserError(
            f"no train.py in '{' '.join(command)}'; type src/train.py fit --config FILE"
        )
    line = parse_command_line(list(command[script + 1 :]))
    values = interpolate(compose(line.files, line.flags)) if line else {}
    if not values.get("name"):
        raise UserError("the run has no name; set one with --name, so that it can be found again")
    check_goes_on(values.get("ckpt_path"))
    return Path(resolve(values.get("runs_dir", "runs"))) / values["name"]


class Supervisor:
    """Starts a command until it ends, or makes no progress.

    Args:
        command: Program and arguments.
        folder: Of the run.
        crashes: Crashes in a row without progress after which to give up.
        backoff: Seconds before the first new start.
        longest: Seconds at most.
    """

    def __init__(
        self, command: Sequence[str], folder: Path, crashes: int, backoff: float, longest: float
    ):
        self.command, self.folder, self.crashes = list(command), folder, crashes
        self.backoff, self.longest = backoff, longest
        self._child: subprocess.Popen | None = None
        self._stopping = False

    def run(self) -> int:
        """Supervise to the end; returns the exit status to end with."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._pass_on)
        launcher = f"supervise.py, process {os.getpid()}"
        Attempts.count(self.folder, launcher)
        while True:
            began = time.monotonic()
            status, errors = self._once()
            self._note(status, time.monotonic() - began)
            if status in (ENDED, MISTAKE, TERMINATED) or self._stopping:
                return status if status >= 0 else 128 - status
            attempts = Attempts.count(self.folder, launcher)
            if attempts.crashes >= self.crashes:
                self._report(attempts, status, errors)
                return GAVE_UP
            seconds = min(self.backoff * 2**attempts.crashes, self.longest)
            reached = progress(self.folder)
            print(f"supervise: {_name(status)} after step {reached[2]}; again in {seconds:g} s")
            self._wait(seconds)
            if self._stopping:
                return 128 + signal.SIGTERM

    def _once(self) -> tuple[int, list[str]]:
        """Run the command; returns its status and the end of its error output, which is shown, too.

        It has a session of its own, so that what it leaves behind (ranks, data workers) ends too.
        """
        child = subprocess.Popen(
            self.command,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {SUPERVISED: "1"},
        )
        self._child = child
        if self._stopping:
            child.terminate()
        tail: deque[str] = deque(maxlen=LAST_LINES)

        def show() -> None:
            for line in child.stderr:
                sys.stderr.write(line)
                tail.append(line.rstrip("\n"))

        reader = threading.Thread(target=show, daemon=True)
        reader.start()
        status = child.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        reader.join(timeout=5)
        return status, list(tail)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stopping and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))

    def _pass_on(self, number: int, frame: object) -> None:
        self._stopping |= number != signal.SIGUSR1
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def _note(self, status: int, seconds: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _, saved, logged = progress(self.folder)
        row = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "status": status,
            "seconds": round(seconds, 1),
            "checkpoint_step": saved,
            "logged_step": logged,
        }
        with open(self.folder / "supervise.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _report(self, attempts: Attempts, status: int, errors: list[str]) -> None:
        details = [
            f"last status  {_name(status)}",
            f"command      {' '.join(self.command)}",
            "",
            "end of the error output",
            *(f"  {line}" for line in errors),
        ]
        path = write_report(self.folder, attempts, details)
        print(f"supervise: {summary(self.folder, attempts)} See {path}", file=sys.stderr)


def _name(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--crashes", type=int, default=CRASHES, help="in a row without progress")
    parser.add_argument("--backoff", type=float, default=5.0, help="seconds before a new start")
    parser.add_argument("--longest", type=float, default=600.0, help="seconds at most")
    parser.add_argument("--print_folder", action="store_true", help="that of the run, and stop")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="src/train.py fit --config …")
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if command and command[0].endswith(".py"):
        command = [sys.executable, *command]
    try:
        folder = run_folder(command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    if options.print_folder:
        print(folder)
        return ENDED
    supervisor = Supervisor(command, folder, options.crashes, options.backoff, options.longest)
    return supervisor.run()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
