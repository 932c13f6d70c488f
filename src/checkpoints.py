"""Checkpoints of a run: python src/checkpoints.py list|verify|pin|prune|restore|export RUN."""

import sys

from smol.checkpoints.command import main

if __name__ == "__main__":
    sys.exit(main())
