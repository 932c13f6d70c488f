"""The command line of ``ablate.py``."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from smol.errors import UserError, nearest
from smol.paths import resolve

HELP = """\
Compare variants of a baseline that each change one thing, over seeds.

STUDY is a YAML file, as in configs/ablations. Each run is a train.py fit in a process of its own;
what has finished is not run again, also if another study made it. The same command goes on with a
study that was interrupted. The report is written into runs/ablations/STUDY.

examples:
  python src/ablate.py configs/ablations/qk_norm.yaml --jobs 2
  python src/ablate.py configs/ablations/qk_norm.yaml --dry_run
  python src/ablate.py configs/ablations/gqa_ratio.yaml --promote ratio_2
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized"):
            flag = message.split(": ", 1)[1].split()[0].partition("=")[0]
            hint = nearest(flag, self._option_string_actions)
        raise UserError(f"{message}.{hint}")


def _parser() -> _Parser:
    parser = _Parser(
        prog="ablate.py",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("study", metavar="STUDY", help="YAML file")
    add("--jobs", type=int, default=1, metavar="K", help="runs at a time on this machine (1)")
    add("--launcher", choices=["local", "submitit"], default="local", help="where runs go (local)")
    add("--retry", choices=["failed", "all"], help="run again what failed, or everything")
    add("--dry_run", action="store_true", help="check the study and print what it would run")
    add("--report", action="store_true", help="run nothing, report what is there")
    add("--promote", metavar="VARIANT", help="make an adopted variant the new baseline")
    add("--folder", default="runs/ablations", help="of all runs and reports (runs/ablations)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 after a mistake of the user's."""
    from smol.cli import user_message

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends the runs
    try:
        args = _parser().parse_args(arguments)
        run_study(**vars(args))
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def run_study(
    study: str | Path,
    jobs: int = 1,
    launcher: str = "local",
    retry: str | None = None,
    dry_run: bool = False,
    report: bool = False,
    promote: str | None = None,
    folder: str | Path = "runs/ablations",
) -> list[Any]:
    """Carry out a study as far as it is not done, judge its variants and write the report.

    Args:
        study: The YAML file.
        jobs: Runs at a time on this machine.
        launcher: ``local``, or ``submitit`` for a SLURM cluster.
        retry: ``failed`` or ``all`` to run those again.
        dry_run: Only check the study and print its runs.
        report: Run nothing.
        promote: The adopted variant that becomes the new baseline.
        folder: Of all ablations.

    Returns:
        The verdicts, a `smol.experiments.ablation.Verdict` for each variant; none of a dry run.

    Raises:
        UserError: On a mistake in the study, before anything is run.
    """
    from smol.experiments.ablation import judge, load_results, load_study
    from smol.experiments.ablation.arms import build_arms
    from smol.experiments.ablation.mixtures import repetition_warnings
    from smol.experiments.ablation.report import write_report
    from smol.experiments.ablation.runs import (
        FAILED,
        FINISHED,
        RECORD,
        Pool,
        carry_out,
        runs_of,
        submitit_executor,
    )

    if jobs < 1:
        raise UserError(f"--jobs is {jobs}, expected 1 or more")
    plan = load_study(study)
    arms, root = build_arms(plan), Path(resolve(folder))
    runs = runs_of(arms, plan.seeds, root)
    for arm in arms:
        for line in repetition_warnings(arm.name, arm.resolved):
            print(f"warning: {line}")
    if dry_run:
        for run in runs:
            print(f"{run.arm:<24} seed {run.seed:<6} {run.status:<10} {run.folder}")
        return []
    again = {"failed": (FAILED,), "all": (FAILED, FINISHED)}.get(retry, ())
    for run in runs:
        if run.status in again and not report:
            (run.folder / RECORD).unlink()
    open_runs = [run for run in runs if run.status not in (FINISHED, FAILED)]
    if open_runs and not (report or promote):
        where = root / plan.name
        print(
            f"{plan.name}: {len(open_runs)} of {len(runs)} runs to go, {jobs} at a time", flush=True
        )
        if launcher == "submitit":
            executor = submitit_executor(where / "slurm", plan.name, dict(plan.slurm))
            carry_out(open_runs, executor, _say)
        else:
            with Pool(jobs) as pool:
                carry_out(open_runs, pool, _say)
    results = load_results(plan, arms, runs)
    verdicts = [judge(results, arm.name) for arm in results.variants]
    _print(results, verdicts)
    markdown, page = write_report(results, verdicts, root / plan.name)
    print(f"report  {markdown}\n        {page}")
    if promote:
        from smol.experiments.ablation.promote import promote as promoted

        print("\n".join(promoted(results, verdicts, promote)))
    return verdicts


def _say(line: str) -> None:
    print(line, flush=True)


def _print(results: Any, verdicts: Sequence[Any]) -> None:
    """The table of verdicts on the screen, and which runs failed."""
    from smol.experiments.ablation.report import verdict_table

    table = verdict_table(results, verdicts)
    cells = [list(table.header), *map(list, table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{next(iter(results.study.metrics))}, variant minus baseline")
    for row in cells:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    for run in results.runs:
        if run.message:
            print(f"{run.status}: {run.run.arm}, seed {run.run.seed}: {run.message}")
    for line in results.warnings:
        print(f"warning: {line}")
