"""Preference optimisation on two gloo ranks equals one process."""

import json
import sys
from pathlib import Path

import pytest
from preference_parts import (
    assert_same,
    cache_files,
    make_module,
    make_preferences,
    prepare_pairs,
    run,
)
from warm_python import python

from smol.optim import WSD
from smol.parallel.processes import leave_groups_at_exit


def launch(folder: Path, strategy: str) -> list[list[dict]]:
    """Train on two gloo ranks; returns what each has recorded."""
    done = python(__file__, folder, strategy, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def train_ranks(folder: Path, strategy: str) -> None:
    from smol.parallel import FSDP2Strategy

    kind = FSDP2Strategy() if strategy == "fsdp2" else strategy
    reference = "live" if strategy == "fsdp2" else "cached"
    options = {"devices": 2, "strategy": kind, "limit_val_batches": 1.0}
    module = make_module(folder, schedule=WSD(warmup_steps=2), reference=reference)
    data = make_preferences(folder, micro_batch_tokens=256)
    module, steps = run(folder, 4, module, data=data, **options)
    held_out = {k: float(v) for k, v in module.trainer.callback_metrics.items() if "held" in k}
    rank = module.trainer.global_rank
    (folder / f"rank{rank}.json").write_text(json.dumps([*steps, held_out]))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_equal_one(tmp_path, strategy):
    folder = prepare_pairs(tmp_path)
    module = make_module(folder, schedule=WSD(warmup_steps=2))
    module, whole = run(folder, 4, module, limit_val_batches=1.0)
    held_out = {k: float(v) for k, v in module.trainer.callback_metrics.items() if "held" in k}
    [file.unlink() for file in cache_files(folder)]
    (*a, out_a), (*b, out_b) = launch(folder, strategy)
    assert out_a == out_b
    both = [{k: x[k] + y[k] if k != "norm" else x[k] for k in x} for x, y in zip(a, b, strict=True)]
    assert_same(both, whole, rel=1e-3, abs=1e-3)
    assert out_a == pytest.approx(held_out, rel=1e-3, abs=1e-3)
    assert len(cache_files(folder)) == (strategy == "ddp")


if __name__ == "__main__":
    train_ranks(Path(sys.argv[1]), sys.argv[2])
    leave_groups_at_exit()
