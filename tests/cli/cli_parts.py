"""Small parts that the command line tests build by class path."""

import os
import signal
from dataclasses import dataclass
from typing import Literal

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from smol.errors import UserError


@dataclass
class Decoder:
    hidden_size: int = 8
    layers: int = 1


@dataclass
class Stage:
    context_length: int = 16
    mixture: dict[str, float] | None = None


@dataclass
class Required:
    length: int


class Attention:
    def __init__(self, window: int = 2):
        self.window = window


class StridedAttention(Attention):
    def __init__(self, stride: int, edge: Literal["wrap", "cut"] = "cut"):
        self.stride, self.edge = stride, edge


class LinearAttention(Attention):
    def __init__(self, rank: int = 2):
        self.rank = rank


class Model(pl.LightningModule):
    """Pulls a vector towards one; what it reaches tells learning rate and steps apart."""

    def __init__(
        self,
        decoder: Decoder,
        attention: Attention | None = None,
        lr: float = 0.25,
        refuse: str | None = None,
        fail: str | None = None,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.decoder, self.attention, self.lr, self.fail = decoder, attention, lr, fail
        self.weight = torch.nn.Parameter(torch.zeros(decoder.hidden_size))
        if refuse == "user":
            raise UserError("the model is refused; type --model.refuse null")
        if refuse == "bug":
            raise ValueError("a mistake of the programmer's")

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        if self.fail == "step":
            raise UserError("the step failed; type --model.fail null")
        if self.fail == "interrupt":
            raise KeyboardInterrupt
        if self.fail == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        return (self.weight - 1).pow(2).mean()

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("weight", self.weight.mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Rows(Dataset):
    def __init__(self, fail: bool):
        self.fail = fail

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.fail:
            raise UserError("row 0 is bad, got 1, expected 2")
        return torch.zeros(1)


class Data(pl.LightningDataModule):
    def __init__(
        self,
        stages: dict[str, Stage | None] | None = None,
        workers: int = 0,
        fail: bool = False,
        required: dict[str, Required] | None = None,
    ):
        super().__init__()
        self.stages, self.workers, self.fail = stages, workers, fail

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Rows(self.fail), num_workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        return self.train_dataloader()


class Guard(pl.Callback):
    order = 100

    def __init__(self, limit: float = 1.0):
        self.limit = limit


class Monitor(pl.Callback):
    order = 200

    def __init__(self, every: int = 1):
        self.every = every


class Unordered(pl.Callback):
    pass


class Report(pl.Callback):
    order = 300
