"""The command line of ``evaluate.py``."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

from smol.errors import UserError, nearest
from smol.evaluation.model_folder import ModelFolder, find_model
from smol.evaluation.results import FILE, TABLE, table
from smol.evaluation.runner import Settings, evaluate_model, watch
from smol.evaluation.tasks import known_tasks, load_task
from smol.paths import resolve

HELP = """\
Measure models on tasks, side by side.

MODEL is a run's folder (its newest checkpoint counts), a checkpoint, a decoder folder or a Hugging
Face folder. TASK is a name in configs/tasks or a YAML file of the same form. Results are written
into the folder of each run or model as evaluation.json and evaluation.md, or into --out; what is
there already is not measured again. Texts begin with the end-of-text token of a run, as in its
training, and with what the tokenizer of a Hugging Face folder puts there, if anything.

examples:
  python src/evaluate.py runs/stage1 runs/stage2 --tasks generated --limit 100
  python src/evaluate.py runs/sft --tasks chat --mode no_think
  python src/evaluate.py exported/ --tasks arc_easy hellaswag --out results
"""
DTYPES = ("float32", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized"):
            flag = message.split(": ", 1)[1].split()[0].partition("=")[0]
            hint = nearest(flag, self._option_string_actions)
        raise UserError(f"{message}.{hint}")


def _parser() -> _Parser:
    parser = _Parser(
        prog="evaluate.py",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL")
    add("--tasks", nargs="+", default=[], metavar="TASK", help=f"known: {', '.join(known_tasks())}")
    add("--limit", type=int, metavar="N", help="at most so many records of each task")
    add("--mode", choices=["think", "no_think", "both"], help="of chats; default for them: both")
    add("--out", metavar="FOLDER", help="where results go (default: the folder of each model)")
    add("--device", default="cpu", help="such as cuda (default: cpu)")
    add("--dtype", choices=DTYPES, help="of the weights (default: what is stored)")
    add("--max_length", type=int, metavar="N", help="tokens a model may read (default: as trained)")
    add("--batch_size", type=int, default=16, metavar="N", help="answers at a time (default: 16)")
    add("--tokenizer", metavar="FOLDER", help="where a model does not say which is its own")
    add("--force", action="store_true", help="measure again what is there already")
    add("--all", action="store_true", help="also show accuracies by group")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--watch", action="store_true", help="evaluate the checkpoints of a run as they are saved")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 after a mistake of the user's."""
    from smol.cli import user_message

    try:
        _run(_parser().parse_args(arguments))
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _run(args: argparse.Namespace) -> None:
    if not args.tasks:
        raise UserError(f"--tasks is missing: name some of {', '.join(known_tasks())}, or files")
    for name in ("limit", "max_length", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} is {value}, expected 1 or more")
    _check_device(args.device)
    modes = {None: (), "both": ("no_think", "think")}.get(args.mode, (args.mode,))
    settings = Settings(
        [load_task(name) for name in dict.fromkeys(args.tasks)],
        args.limit,
        modes,
        None if args.out is None else Path(resolve(args.out)),
        args.device,
        args.dtype,
        args.max_length,
        args.tokenizer,
        args.batch_size,
        args.force,
        # Standard output is for the table.
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if args.watch:
        if len(args.models) != 1:
            raise UserError(f"--watch looks after one run, {len(args.models)} were named")
        return watch(args.models[0], settings)
    folders = _distinct([find_model(path, args.tokenizer) for path in args.models])
    rows = [row for folder in folders for row in evaluate_model(folder, settings)]
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print(table(rows, args.all), end="")
    places = dict.fromkeys(settings.out or folder.results for folder in folders)
    settings.log("\n".join(f"wrote {place / FILE} and {TABLE}" for place in places))


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {name} cannot be used here ({reason}); try --device cpu"
        ) from None


def _distinct(folders: Iterable[ModelFolder]) -> list[ModelFolder]:
    """Models of the same name, in different places, go by their paths."""
    by_weights = {folder.weights: folder for folder in folders}
    names = [folder.name for folder in by_weights.values()]
    return [
        folder if names.count(folder.name) == 1 else replace(folder, name=str(folder.weights))
        for folder in by_weights.values()
    ]
