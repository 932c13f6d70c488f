"""The tiny model with all callbacks on two gloo ranks, each half of every block; under torchrun."""

import json
import os
import sys
from pathlib import Path

from test_everything import everything
from tiny import make_data, make_module, make_stages, make_trainer

from callbacks import Fault, FaultInjection, WritePredictions
from smol.experiments import CSVLogger
from smol.parallel import FSDP2Strategy
from smol.parallel.processes import leave_groups_at_exit

# In the second rank alone, and in what it alone has.
FAULTS = [
    {"kind": "nan_gradient_before_reduce", "step": 3, "target": "layers.1.mlp"},
    {"kind": "nan_activation", "step": 5, "micro": 0, "target": "layers.0.input_layernorm"},
    {"kind": "nan_weight", "step": 7, "target": "layers.0.mlp"},
    {"kind": "nan_loss", "step": 9, "micro": 0},
]


def run(sources, folder, faults=(), **kwargs):
    """Train, then predict; returns the trainer after training."""
    chosen = everything()
    if faults:
        chosen.append(FaultInjection([Fault(**fault, rank=1) for fault in faults]))
    chosen.sort(key=lambda callback: callback.order)
    stages = {"one": {"cats": 0.7, "dogs": 0.3}, "two": {"cats": 0.2, "dogs": 0.8}}
    stages["one"]["start_step"], stages["two"]["start_step"] = 0, 8
    trainer = make_trainer(
        folder,
        12,
        callbacks=chosen,
        logger=CSVLogger(str(folder)),
        limit_val_batches=1.0,
        val_check_interval=5,
        **kwargs,
    )
    module = make_module(num_kv_heads=2, z_loss=1e-4)
    data = make_data(sources, make_stages(sources, **stages), micro_batch_tokens=128)
    trainer.fit(module, data)
    if not faults:
        if kwargs:
            kwargs["strategy"] = FSDP2Strategy(tensor_parallel_size=2)
        predictor = make_trainer(folder, -1, callbacks=[WritePredictions()], **kwargs)
        predictor.predict(module, make_data(sources))
    return trainer


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        strategy = FSDP2Strategy(tensor_parallel_size=2)
        folder = Path(job["folder"])
        trainer = run(Path(job["sources"]), folder, job["faults"], devices=2, strategy=strategy)
        rank = os.environ["RANK"]
        seen = [trainer.global_step, trainer.datamodule.loader.position]
        (folder / f"rank{rank}.json").write_text(json.dumps(seen))
        del trainer
    leave_groups_at_exit()
