"""A plain module, and a callback that sees what a fault has done."""

from collections import defaultdict

import pytest
import torch
from lightning import Callback, LightningModule
from tiny import make_data, make_module, make_trainer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from callbacks.fault_injection import Fault, FaultInjection

MICROS = 2


class Plain(LightningModule):
    """A classifier that knows nothing of this project."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.batches = []

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        self.batches.append((inputs.clone(), labels.clone()))
        return {"loss": F.cross_entropy(self.layers(inputs), labels), "other": 1}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self):
        inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size=8)


def bad(tensors):
    """How many numbers of this process are not finite."""
    tensors = [t.detach() for t in tensors if t is not None]
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(int((~part.isfinite()).sum()) for part in parts)


class Witness(Callback):
    """Sees losses by step and micro-batch, and what is not finite by step."""

    order = 100

    def __init__(self):
        self.losses = {}
        self.weights, self.gradients, self.moments = {}, {}, {}
        self.largest, self.owners = {}, defaultdict(list)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self._at = trainer.global_step, batch_idx % trainer.accumulate_grad_batches
        self.weights[trainer.global_step] = bad(module.parameters())

    def on_before_optimizer_step(self, trainer, module, optimizer):
        step = trainer.global_step
        named = {n: p for n, p in module.named_parameters() if p.grad is not None}
        self.gradients[step] = bad(p.grad for p in named.values())
        self.owners[step] += [name for name, p in named.items() if bad([p.grad])]
        self.largest[step] = max(float(local(p.grad).abs().max()) for p in named.values())
        states = optimizer.state.values()
        self.moments[step] = bad(v for state in states for v in state.values())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses[self._at] = float(outputs["loss"])

    def losses_not_finite(self):
        return [at for at, loss in self.losses.items() if bad([torch.tensor(loss)])]


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fit(folder, *faults, sources=None, steps=4, callbacks=(), module=None, **kwargs):
    """Train the plain module, or the tiny decoder on sources; returns a witness and the module."""
    torch.manual_seed(0)
    witness = Witness()
    options = {} if sources else {"plugins": [], "accumulate_grad_batches": MICROS}
    injection = FaultInjection(list(faults))
    trainer = make_trainer(
        folder, steps, callbacks=[injection, witness, *callbacks], **(options | kwargs)
    )
    module = module or (make_module() if sources else Plain())
    trainer.fit(module, make_data(sources, micro_batch_tokens=256 // MICROS) if sources else None)
    return witness, module


@pytest.fixture(params=["plain", "decoder"])
def train(request, tmp_path, sources):
    """``train(*faults)`` on a module of another's, and on a decoder of this project."""
    options = {"sources": sources} if request.param == "decoder" else {}

    def run(*faults, folder="run", **kwargs):
        return fit(tmp_path / folder, *faults, **(options | kwargs))

    return run


__all__ = ["MICROS", "Fault", "FaultInjection", "Plain", "Witness", "bad", "fit", "local", "train"]
