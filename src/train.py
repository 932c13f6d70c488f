"""Train, validate, test or predict: ``python src/train.py fit --config configs/stage1.yaml``."""

from smol.cli import main

if __name__ == "__main__":
    main()
