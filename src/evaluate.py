"""Measure models on tasks: python src/evaluate.py RUN_OR_HF_FOLDER… --tasks NAME_OR_FILE…"""

import sys

from smol.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main())
