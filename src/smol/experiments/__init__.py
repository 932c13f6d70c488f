"""What runs leave behind: logs, reports, plots."""

from smol.experiments.loggers import CSVLogger, TensorBoardLogger, WandbLogger

__all__ = ["CSVLogger", "TensorBoardLogger", "WandbLogger"]
