"""Python programs in processes of their own, which need not wait for the imports of torch.

Every test process keeps a server that has imported what is large and not of this project; the
programs are forks of it. Whether a cold start works is asked by the tests of ``src/train.py`` and
of the launchers.
"""

import atexit
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

TESTS = Path(__file__).parent
_SERVER = get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "lightning.pytorch.cli", "matplotlib.figure"])
_GRACE = 20  # seconds in which processes end by themselves once one of them has failed


def python(
    *words: object,
    ranks: int = 1,
    cwd: Path | None = None,
    timeout: float = 250,
    **environment: str,
) -> subprocess.CompletedProcess:
    """Run a program to its end, as ``python WORDS`` would.

    Args:
        words: A script and its arguments, or ``-c``, a program and its arguments. It finds what
            lies beside it, the modules in ``tests`` and in ``tests/data``, and ``callbacks``.
        ranks: How many processes of one group run it, as torchrun would start them.
        cwd: Where it runs.
        timeout: Seconds, after which it is killed.
        environment: Variables on top of those of this process.

    Returns:
        The status of the first process that failed (negative: the signal that ended it), or 0, and
        what all have written.
    """
    words = tuple(map(str, words))
    with tempfile.TemporaryDirectory() as folder:
        processes, written = [], []
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        meeting["TORCHELASTIC_RUN_ID"] = "none"
        for rank in range(ranks):
            variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
            if ranks > 1:
                numbers = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
                numbers |= {"RANK": rank, "LOCAL_RANK": rank}
                variables |= meeting | {name: str(number) for name, number in numbers.items()}
            files = [str(Path(folder) / f"{rank}.{kind}") for kind in ("out", "err")]
            what = (words, str(cwd or Path.cwd()), variables, *files)
            processes.append(_SERVER.Process(target=_run, args=what))
            written.append(files)
            processes[-1].start()
        status = _wait(processes, timeout)
        out, err = ("".join(map(_read, files)) for files in zip(*written, strict=True))
    return subprocess.CompletedProcess(words, status, out, err)


def _wait(processes: list, timeout: float) -> int:
    """The status of the first process that fails, or 0."""
    failed, until = 0, time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        codes = [process.exitcode for process in processes]
        if not failed and any(codes):
            failed = next(code for code in codes if code)
            until = min(until, time.monotonic() + _GRACE)
        if time.monotonic() > until:
            for process in processes:
                process.kill()
                process.join()
            if not failed:
                raise TimeoutError(f"did not end within {timeout} seconds")
        time.sleep(0.02)
    return failed or next((process.exitcode for process in processes if process.exitcode), 0)


def _run(words: tuple, cwd: str, variables: dict, out: str, err: str) -> None:
    """Be the program; in the process that was forked for it."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    sources = (
        (os.devnull, os.O_RDONLY),
        *((path, os.O_WRONLY | os.O_CREAT) for path in (out, err)),
    )
    for number, (path, flags) in enumerate(sources):
        opened = os.open(path, flags | os.O_APPEND, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (open(n, mode) for n, mode in enumerate("rww"))  # noqa: SIM115
    installed = [path for path in sys.path if not path.startswith(str(TESTS))]
    beside = "" if words[0] == "-c" else str(Path(words[0]).resolve().parent)
    own = [str(TESTS.parent), str(TESTS), str(TESTS / "data")]
    named = variables.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [beside, *filter(None, named), *own, *installed]
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = list(words)
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing leaves them out
        sys.stdout.flush()
        sys.stderr.flush()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""
