"""The tiny run on two gloo ranks, with faults in one of them; Lightning starts it per rank."""

import json
import sys
from pathlib import Path

import torch
from drills import train
from torch.distributed.tensor import DTensor

from smol.parallel import FSDP2Strategy
from smol.parallel.processes import leave_groups_at_exit


def main(options):
    sources, folder = Path(options["sources"]), Path(options["folder"])
    strategy = "ddp"
    if options["strategy"] == "fsdp2":
        strategy = FSDP2Strategy(reshard_after_forward=False)
    # Validation comes right before snapshots, and leaves nothing gathered that they would take.
    kwargs = {"devices": 2, "strategy": strategy, "micro": 64}
    kwargs |= {"limit_val_batches": 1, "val_check_interval": 5}
    run = train(
        folder, sources, faults=options.get("faults", ()), omit=options.get("omit", ()), **kwargs
    )
    state = run.module.state_dict()
    shards = {n: w.to_local() if isinstance(w, DTensor) else w for n, w in state.items()}
    skipped = run.datamodule.loader.curriculum.segments[0].skipped
    losses = sorted(run.watch.losses.items())
    torch.save(
        {"weights": shards, "skipped": skipped, "losses": losses}, f"{folder}/{run.global_rank}.pt"
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    leave_groups_at_exit()
