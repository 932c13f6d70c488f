"""Trains the tiny model on several gloo ranks, one run after another, under torchrun."""

import json
import os
import sys
from pathlib import Path

import torch
from lightning import Callback
from tiny import make_data, make_module, make_stages, make_trainer

from smol.data.batch import IGNORE
from smol.parallel import FSDP2Strategy
from smol.parallel.processes import leave_groups_at_exit

STAGES = {
    "one": {"start_step": 0, "cats": 0.7, "dogs": 0.3},
    "two": {"start_step": 3, "cats": 0.2, "dogs": 0.8, "context_length": 64},
}


# By name: how two ranks share the work, what the decoder has, and tokens of a micro-batch.
TENSOR_PARALLEL = {"tensor_parallel_size": 2}
EVERYTHING = {"tie_embeddings": False, "qk_norm": True, "attention_bias": "all"}
RUNS = {
    "ddp": ("ddp", {}, 64),
    "fsdp2": ({}, {}, 64),
    "hsdp": ({"shard_size": 1}, {}, 64),
    "cpu_offload": ({"cpu_offload": True, "reshard_after_forward": False}, {}, 64),
    "tensor_parallel": (TENSOR_PARALLEL, {}, 128),
    "tensor_parallel_everything": (TENSOR_PARALLEL | {"shard_size": 1}, EVERYTHING, 128),
    "tensor_parallel_checkpointed": (TENSOR_PARALLEL, {"activations": "selective"}, 128),
    "tensor_parallel_dropout": (TENSOR_PARALLEL, {"dropout": 0.1}, 128),
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
            sums = torch.stack([module._sums["loss"].double(), module._sums["tokens"].double()])
            loss, tokens = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
            step = {"rows": self.rows, "norm": float(module._grad_norm)}
            step |= {"loss": loss / tokens, "tokens": tokens, "seed": torch.initial_seed()}
            self.steps.append(step)
            self.rows = []


def run(sources, folder, strategy, steps, micro, uneven, save=None, resume=None, decoder=None):
    """Train and return what was recorded on this rank.

    Args:
        strategy: ``single``, ``ddp`` or the arguments of FSDP2Strategy.
        decoder: Fields of the decoder, and ``activations``, the kind of checkpointing.
    """
    record, decoder = Record(uneven), {"num_kv_heads": 2} | (decoder or {})
    kwargs = {}
    if strategy != "single":
        kwargs["devices"] = int(os.environ["WORLD_SIZE"])
        kwargs["strategy"] = strategy if strategy == "ddp" else FSDP2Strategy(**strategy)
    kwargs |= {"limit_val_batches": 1.0, "callbacks": [record]}  # the last step validates
    trainer = make_trainer(folder, steps, **kwargs)
    data = make_data(sources, make_stages(sources, **STAGES), micro_batch_tokens=micro)
    activations = decoder.pop("activations", "none")
    module = make_module(**decoder)
    module.activation_checkpointing = activations
    trainer.fit(module, data, ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save)
    record.steps[-1]["bits_per_byte"] = float(trainer.callback_metrics["held_out/bits_per_byte"])
    return trainer, record.steps


if __name__ == "__main__":
    for options in json.loads(sys.argv[1]):
        sources, folder = Path(options.pop("sources")), Path(options.pop("folder"))
        trainer, steps = run(sources, folder, **options)
        (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(steps))
        del trainer
    leave_groups_at_exit()
