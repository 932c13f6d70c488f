"""Trains the tiny model on two gloo ranks; Lightning runs it as a script, once per rank."""

import json
import sys
from pathlib import Path

from lightning import Callback
from tiny import make_data, make_module, make_stages, make_trainer

from smol.data.batch import IGNORE
from smol.parallel import FSDP2Strategy

STAGES = {
    "one": {"start_step": 0, "cats": 0.7, "dogs": 0.3},
    "two": {"start_step": 3, "cats": 0.2, "dogs": 0.8, "context_length": 64},
}


class Record(Callback):
    """Rows, losses and gradient norms, by optimiser step; hides an uneven number of targets."""

    def __init__(self, uneven: bool):
        self.uneven, self.rows, self.steps = uneven, [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.uneven:
            batch.exact = False
            for row, targets in zip(batch.tokens, batch.targets, strict=True):
                targets[: int(row.sum()) % 29] = IGNORE
        self.rows += batch.tokens.tolist()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch.micro == batch.accumulation - 1:
            self.steps.append({"rows": self.rows, "norm": float(module._grad_norm)})
            self.rows = []


def run(sources, folder, strategy, steps, micro, uneven, save=None, resume=None):
    """Train and return what was recorded on this rank."""
    record = Record(uneven)
    kwargs = {"devices": 2} if strategy != "single" else {}
    if strategy != "single":
        kwargs["strategy"] = FSDP2Strategy() if strategy == "fsdp2" else "ddp"
    kwargs |= {"limit_val_batches": 1.0, "callbacks": [record]}  # the last step validates
    trainer = make_trainer(folder, steps, **kwargs)
    data = make_data(sources, make_stages(sources, **STAGES), micro_batch_tokens=micro)
    trainer.fit(make_module(), data, ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save)
    record.steps[-1]["bits_per_byte"] = float(trainer.callback_metrics["held_out/bits_per_byte"])
    return trainer, record.steps


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    sources, folder, output = (Path(options.pop(k)) for k in ("sources", "folder", "output"))
    trainer, steps = run(sources, folder, **options)
    (output / f"rank{trainer.global_rank}.json").write_text(json.dumps(steps))
