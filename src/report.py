"""Report on a run, or compare several: python src/report.py RUN [RUN…] [--out FOLDER]."""

import argparse
import sys
from pathlib import Path

from smol.cli import user_message


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 after a mistake."""
    parser = argparse.ArgumentParser(description="Write report.md and report.html of runs.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder, or name of one in runs/")
    parser.add_argument("--out", metavar="FOLDER", help="where they go (the folder of the run)")
    args = parser.parse_args(arguments)
    try:
        from smol.experiments.report import write_comparison, write_run_report

        out = None if args.out is None else Path(args.out)
        several = len(args.runs) > 1
        page = write_comparison(args.runs, out) if several else write_run_report(args.runs[0], out)
    except Exception as error:
        if (message := user_message(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    print(f"report      {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
