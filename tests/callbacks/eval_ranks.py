"""Trains the tiny model on two gloo ranks with EvalLoss; Lightning runs it once per rank."""

import sys
from pathlib import Path

from tiny import make_data, make_module, make_trainer

from callbacks.eval_loss import EvalLoss
from smol.parallel import FSDP2Strategy
from smol.parallel.processes import leave_groups_at_exit


def run(sources, folder, micro, **kwargs):
    """Two steps, validation before the first and after the last, of an odd number of batches."""
    trainer = make_trainer(folder, 2, callbacks=[EvalLoss()], limit_val_batches=1.0, **kwargs)
    data = make_data(sources, micro_batch_tokens=micro, held_out_tokens=7 * 32)
    trainer.fit(make_module(), data)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), micro=64, devices=2, strategy=FSDP2Strategy())
    leave_groups_at_exit()
