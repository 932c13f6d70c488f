"""The command line of ``train.py``: ``COMMAND --config FILE… --key value…``, errors in one line.

This module stays light, so that help and mistyped commands answer at once; Lightning is imported
by `smol.lightning_cli` when there is something to run.
"""

import errno
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smol.config import parse_yaml
from smol.errors import TemporaryError, UserError, nearest

if TYPE_CHECKING:
    from smol.lightning_cli import SmolCLI

COMMANDS = ("fit", "validate", "test", "predict")
TEXT_FLAGS = {"name", "runs_dir", "continues", "init_from", "ckpt_path"}  # never read as YAML

SHORT = {"-c": "--config", "-h": "--help"}
WITHOUT_VALUE = ("--help", "--print_config")

MACHINE_SAYS_NO = {
    errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EROFS, errno.ENOSPC, errno.EFBIG, errno.EDQUOT,
    errno.ENAMETOOLONG,
}  # fmt: skip

HELP = """\
usage: train.py COMMAND --config FILE [--config FILE ...] [--KEY VALUE ...]

commands:
  fit         train, from the start or from where the run stopped
  validate    measure on the validation data
  test        measure on the test data
  predict     write predictions

options:
  --config FILE, -c FILE    a YAML file; each lies over the one before, its `extends:` below it
  --KEY VALUE               set one key over all files, wherever it stands in the line:
                              --name my_run                     --vars.context 512
                              --model.hidden_size 64            --trainer.max_steps 100
                              --callbacks.throughput.every 9    --callbacks.throughput null
                              --callbacks.mine my_module.MyCallback
  --print_config            print the configuration as it would run, and stop
  --help, -h                this page; after a command, all of its keys
  --KEY.help [CLASS]        after a command: the keys of a class, as --model.help LanguageModeling,
                              or of the one that --config sets; else the classes to choose from

A mistake is one line and exit status 2; SMOL_TRACEBACK=1 shows where it was raised. What may pass
by itself, as a store that is away, is one line and exit status 75, and launchers try it again.

"""
MISTAKE, TEMPORARY = 2, os.EX_TEMPFAIL
PATIENCE_SECONDS = 5.0  # that another rank gives the first one to end


@dataclass
class CommandLine:
    """A command line, taken apart.

    Attributes:
        command: One of `COMMANDS`.
        files: The ``--config`` files, in order.
        flags: Dotted key to value, in order; a key given twice has its last value.
        print_config: Whether to print the configuration and stop.
        help: The arguments that ask for help on the command or on a class of it.
        started: Whether the command has begun to read batches.
    """

    command: str
    files: list[str] = field(default_factory=list)
    flags: dict[str, Any] = field(default_factory=dict)
    print_config: bool = False
    help: list[str] = field(default_factory=list)
    started: bool = False


def parse_command_line(args: list[str]) -> CommandLine | None:
    """Take a command line apart without looking at what its keys mean.

    Returns:
        The parts, or None where general help is asked for.

    Raises:
        UserError: On an unknown command, a flag without a value or a stray word.
    """
    line = CommandLine(command="")
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            if line.command:
                raise UserError(f"unexpected '{word}' after '{line.command}'; a key needs --")
            line.command = _check_command(word)
            continue
        flag, has_value, value = word.partition("=")
        flag = SHORT.get(flag, flag)
        if flag == "--print_config":
            line.print_config = True
        elif flag == "--help" or flag.endswith(".help"):
            line.help = [flag, value] if value else [flag]
            if flag != "--help" and not has_value and rest and not rest[0].startswith("-"):
                line.help.append(rest.pop(0))
        elif not flag.startswith("--"):
            raise UserError(f"unexpected '{word}'; flags begin with --")
        else:
            if not has_value:
                if not rest or rest[0].startswith("--") or rest[0] in SHORT:
                    near = nearest(flag, WITHOUT_VALUE, 0.7)
                    raise UserError(f"{flag} has no value; type {flag} VALUE{near and f'.{near}'}")
                value = rest.pop(0)
            _set(line, flag, value)
    if not line.command:
        if line.help or not args:
            return None
        raise UserError(f"no command; type one of {', '.join(COMMANDS)} after train.py")
    return line


def main(args: list[str] | None = None, run: bool = True) -> "SmolCLI":
    """Build what a command line asks for, and run it.

    Args:
        args: The words after ``train.py``; those of this process when None.
        run: Whether to run the command, or only to build its model, data and trainer.

    Returns:
        The command line object with ``model``, ``datamodule``, ``trainer`` and ``run_folder``.

    Raises:
        SystemExit: With status 2 after a mistake of the user's, 75 after what may pass by itself, 0
            after help or ``--print_config``, 130 after Ctrl-C.
    """
    line, parent = None, os.getppid()
    try:
        line = parse_command_line(sys.argv[1:] if args is None else args)
        if line is None:
            from smol.cli_help import overview

            show(HELP + overview())
            raise SystemExit(0)
        from smol.lightning_cli import SmolCLI

        return SmolCLI(line, run=run)
    except Exception as error:
        message = user_message(error)
        if message is None or os.environ.get("SMOL_TRACEBACK") == "1":
            raise
        if rank() == 0:
            print(f"error: {message}", file=sys.stderr)
        elif (line is not None and line.started) or not _ends(parent):
            print(f"error: rank {rank()}: {message}", file=sys.stderr)
        if isinstance(error, TemporaryError):
            raise SystemExit(TEMPORARY) from None
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() == parent:
            # A mistake is one at the next start, too, and torchrun knows no status that tells it.
            os.kill(parent, signal.SIGTERM)
        raise SystemExit(MISTAKE) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def show(text: str) -> None:
    """Print a page; a reader that has seen enough of it, such as ``head``, is no error."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def user_message(error: Exception) -> str | None:
    """The one line that tells a user's mistake, or None for an error of another kind.

    An error from a data loading worker arrives with the worker's traceback as its message; its
    last line is the one that was meant.
    """
    if isinstance(error, UserError):
        lines = str(error).strip().splitlines() or [""]
        return lines[-1].removeprefix("smol.errors.UserError: ").strip()
    if isinstance(error, OSError) and error.errno in MACHINE_SAYS_NO:
        return f"cannot write or read {error.filename or 'a file'}: {error.strerror}"
    return None


def rank() -> int:
    """The number of this process among those that run the same command, as launchers tell it."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    values = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in values if value.isdigit()), 0)


def _ends(parent: int) -> bool:
    """Wait a while for the process that started this one to end.

    Before the first batch a mistake strikes all ranks alike as a rule, and the first one tells it.
    Its end takes this process along under torchrun, and is seen here where Lightning started it.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(0.1)
    return os.getppid() != parent


def _check_command(word: str) -> str:
    if word not in COMMANDS:
        expected = ", ".join(COMMANDS)
        raise UserError(f"unknown command '{word}', expected {expected}.{nearest(word, COMMANDS)}")
    return word


def _set(line: CommandLine, flag: str, text: str) -> None:
    key = flag.removeprefix("--")
    if key == "config":
        line.files.append(text)
        return
    line.flags.pop(key, None)  # the last of two also takes the last place
    line.flags[key] = text if key in TEXT_FLAGS and text != "null" else _parse_value(flag, text)


def _parse_value(flag: str, text: str) -> Any:
    """Read a flag's value as YAML; what YAML has no words for, such as ``*.txt``, is a string."""
    try:
        return parse_yaml(text, flag) if text.strip() else text
    except UserError:
        if text.lstrip().startswith(("[", "{")):
            raise
        return text
