"""Trains the tiny decoder on two gloo ranks with faults in one; Lightning starts it per rank."""

import json
import os
import sys
from pathlib import Path

import torch
from fault_parts import Fault, FaultInjection, Witness, local
from lightning import Callback
from tiny import make_data, make_module, make_trainer

from callbacks import Events
from smol.parallel import FSDP2Strategy
from smol.parallel.processes import leave_groups_at_exit

FAULTS = [
    Fault("nan_gradient", 1, rank=1),
    Fault("nan_gradient_before_reduce", 2, rank=1, micro=0),
    Fault("nan_activation", 3, rank=1, micro=0, target=r"layers\.1$"),
    Fault("nan_weight", 4, rank=1),
    Fault("nan_loss", 5),
    Fault("nan_moment", 6, rank=1),
    Fault("gradient_explosion", 7, rank=1, micro=0),
    Fault("inf_gradient", 8, rank=None),
    Fault("full_disk", 9, rank=1),
]


class Heal(Callback):
    """Takes every fault away before the next step, so that each is seen alone; writes a file."""

    def __init__(self, path):
        self.path, self.full = path, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        try:
            self.path.write_text("something")
        except OSError:
            self.full.append([trainer.global_step, batch.micro])

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer, module, optimizer):
        for parameter in module.parameters():
            local(parameter.grad).zero_()

    @torch.no_grad()
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch.micro < batch.accumulation - 1:
            return
        states = [v for s in trainer.optimizers[0].state.values() for v in s.values()]
        for tensor in [*module.parameters(), *states]:
            local(tensor).nan_to_num_(nan=0.0)


def main(sources, folder, strategy):
    rank = int(os.environ.get("LOCAL_RANK", 0))
    witness, heal = Witness(), Heal(folder / f"something-{rank}")
    trainer = make_trainer(
        folder, 11, callbacks=[FaultInjection(FAULTS), witness, heal, Events()], devices=2,
        strategy=FSDP2Strategy() if strategy == "fsdp2" else "ddp",
    )  # fmt: skip
    trainer.fit(make_module(), make_data(sources, micro_batch_tokens=64))
    seen = {
        "gradients": list(witness.gradients.values()),
        "weights": list(witness.weights.values()),
        "moments": list(witness.moments.values()),
        "largest": list(witness.largest.values()),
        "losses": witness.losses_not_finite(),
        "full": heal.full,
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    leave_groups_at_exit()
