"""What one rank meets, all ranks avoid."""

import json
from pathlib import Path

import pytest
import torch
from drills import STEP
from warm_python import python

# In the replica, shard or micro-batch of the second rank only.
FAULTS = [
    {"kind": "nan_gradient", "step": 8, "rank": 1, "target": "layers.1"},
    {"kind": "nan_activation", "step": 11, "rank": 1, "micro": 0, "target": "layers.0.mlp"},
    {"kind": "nan_weight", "step": 15, "rank": 1, "target": "layers.0"},
    {"kind": "nan_loss", "step": 21, "rank": 1, "micro": 0},
]
# The steps that were read, by their number: two are dropped; 17 and 18 are bad with the weight, and
# all since the snapshot of step 10 (the 11th read) is left out; one is dropped at last.
SKIPPED = [(8 * STEP, 9 * STEP), (11 * STEP, 19 * STEP), (30 * STEP, 31 * STEP)]


def launch(sources, folder, **options):
    folder.mkdir()
    options |= {"sources": str(sources), "folder": str(folder)}
    done = python(Path(__file__).with_name("guard_ranks.py"), json.dumps(options), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_go_on_as_if_the_data_had_never_been_there(strategy, sources, tmp_path):
    ranks = launch(sources, tmp_path / "run", strategy=strategy, faults=FAULTS)
    omit = [p for start, stop in SKIPPED for p in range(start, stop, STEP)]
    controls = launch(sources, tmp_path / "control", strategy=strategy, omit=omit)
    for run, control in zip(ranks, controls, strict=True):
        assert [tuple(s) for s in run["skipped"]] == SKIPPED
        for name, weight in control["weights"].items():
            assert torch.equal(run["weights"][name], weight), name
        assert {k: v for k, v in run["losses"] if k[0] > 22} == {
            k: v for k, v in control["losses"] if k[0] > 22
        }
    if strategy == "ddp":
        for name, weight in ranks[0]["weights"].items():
            assert torch.equal(weight, ranks[1]["weights"][name]), name
