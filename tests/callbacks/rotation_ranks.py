"""Two gloo ranks, each of which gets a signal of its own; Lightning starts it per rank."""

import os
import signal
import sys
from pathlib import Path

from lightning import Callback
from tiny import make_data, make_module, make_trainer

from callbacks.checkpoint_rotation import CheckpointRotation
from callbacks.events import Events
from smol.parallel.processes import leave_groups_at_exit


class Signals(Callback):
    """The second rank is asked for a checkpoint, the first one to end."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if (trainer.global_step, trainer.global_rank) == (1, 1):
            os.kill(os.getpid(), signal.SIGUSR1)
        if (trainer.global_step, trainer.global_rank) == (5, 0):
            os.kill(os.getpid(), signal.SIGTERM)


def main(sources, folder):
    rotation = CheckpointRotation(every=0, store=str(folder / "safe"))
    trainer = make_trainer(
        folder / "run", 20, devices=2, strategy="ddp", log_every_n_steps=2,
        callbacks=[Signals(), Events(), rotation],
    )  # fmt: skip
    trainer.fit(make_module(), make_data(sources, micro_batch_tokens=64))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
    leave_groups_at_exit()
