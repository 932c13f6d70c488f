"""Compare variants that each change one thing: python src/ablate.py configs/ablations/NAME.yaml"""

import sys

from smol.experiments.ablation.command import main

if __name__ == "__main__":
    sys.exit(main())
