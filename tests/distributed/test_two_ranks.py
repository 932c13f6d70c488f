"""Several processes equal one: rows, losses, gradients, and checkpoints across numbers of them."""

import json
from pathlib import Path

import pytest
import torch
from train_ranks import EVERYTHING, RUNS, run
from warm_python import python

from smol.checkpoints import SafeCheckpointIO

STEPS = 6


def launch(sources, *jobs, ranks=2):
    """Run one job after another on so many ranks, in their ``folder``."""
    defaults = {"sources": sources, "steps": STEPS, "uneven": True}
    for job in jobs:
        job["folder"].mkdir(parents=True)
    options = json.dumps([defaults | job for job in jobs], default=str)
    done = python(Path(__file__).with_name("train_ranks.py"), options, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]


def recorded(folder, ranks=2, copies=1):
    """The optimiser steps, with the rows of all ranks; ``copies`` neighbours have the same."""
    steps = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    for first in range(0, ranks, copies):
        for rank in range(first, first + copies):
            assert [s["rows"] for s in steps[rank]] == [s["rows"] for s in steps[first]]
            assert [s["loss"] for s in steps[rank]] == [s["loss"] for s in steps[0]]
            assert [s["norm"] for s in steps[rank]] == [s["norm"] for s in steps[0]]
    joined = []
    for parts in zip(*steps[::copies], strict=True):
        rows = [tuple(row) for part in parts for row in part["rows"]]
        assert len(set(rows)) == len(rows)
        joined.append(parts[0] | {"rows": sorted(list(row) for row in rows)})
    return joined


def single(sources, folder, **options):
    options = {"strategy": "single", "steps": STEPS, "micro": 256, "uneven": True} | options
    steps = run(sources, folder, **options)[1]
    return [step | {"rows": sorted(step["rows"])} for step in steps]


def assert_same(a, b):
    assert [step["rows"] for step in a] == [step["rows"] for step in b]
    assert [step["tokens"] for step in a] == [step["tokens"] for step in b]
    assert [s["loss"] for s in a] == pytest.approx([s["loss"] for s in b], rel=1e-5)
    assert [s["norm"] for s in a] == pytest.approx([s["norm"] for s in b], rel=2e-4)
    assert a[-1]["bits_per_byte"] == pytest.approx(b[-1]["bits_per_byte"], rel=1e-4)


def weights(folder):
    """All weights of a checkpoint, whatever its files."""

    return SafeCheckpointIO().load_checkpoint(folder)["state_dict"]


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        # Adam turns the last bits of a tiny gradient into whole steps of a hundredth each.
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def one(sources, tmp_path_factory):
    """Folder and steps of one process, by what the decoder has."""
    folder = tmp_path_factory.mktemp("one")
    made = {}
    for name, decoder in {"": {}, "everything": EVERYTHING}.items():
        made[name] = single(sources, folder / name, decoder=decoder, save=folder / name / "ck")
    return folder, made


@pytest.fixture(scope="module")
def two(sources, tmp_path_factory):
    """Folder of all runs on two ranks."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [
        {"folder": folder / name, "strategy": strategy, "decoder": decoder, "micro": micro}
        | {"save": folder / name / "ck"}
        for name, (strategy, decoder, micro) in RUNS.items()
    ]
    launch(sources, *jobs)
    return folder


def copies(name):
    return 2 if name.startswith("tensor_parallel") else 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if "dropout" not in name])
def test_two_ranks_equal_one(one, two, name):
    """Uneven masks, a change of context on the way, and a change of accumulation beside it."""
    folder, steps = one
    which = "everything" if "everything" in name else ""
    assert_same(steps[which], recorded(two / name, copies=copies(name)))
    assert_same_weights(folder / which / "ck", two / name / "ck")


@pytest.mark.slow
def test_tensor_parallel_ranks_drop_elements_of_their_own(two):
    recorded(two / "tensor_parallel_dropout", copies=2)  # asserts that they agree on the loss
    ranks = [
        json.loads((two / f"tensor_parallel_dropout/rank{r}.json").read_text()) for r in (0, 1)
    ]
    for ours, theirs in zip(*ranks, strict=True):
        assert ours["seed"] != theirs["seed"]


@pytest.mark.slow
def test_four_ranks_equal_one(sources, one, tmp_path):
    """Two groups of two tensor-parallel ranks, over which parameters are sharded too."""
    job = {"folder": tmp_path / "four", "strategy": {"tensor_parallel_size": 2}, "micro": 64}
    launch(sources, job | {"save": tmp_path / "four/ck"}, ranks=4)
    folder, steps = one
    assert_same(steps[""], recorded(tmp_path / "four", ranks=4, copies=2))
    assert_same_weights(folder / "ck", tmp_path / "four/ck")


@pytest.mark.slow
def test_a_run_moves_between_one_rank_and_two(sources, one, tmp_path):
    folder, steps = one
    options = {"strategy": {}, "micro": 128}
    save = tmp_path / "a/ck"
    launch(sources, options | {"folder": tmp_path / "a", "steps": 2, "save": save})
    second = single(sources, tmp_path / "b", steps=4, resume=save, save=tmp_path / "b/ck")
    save = tmp_path / "c/ck"
    job = options | {"folder": tmp_path / "c", "resume": tmp_path / "b/ck", "save": save}
    launch(sources, job)
    assert_same(steps[""], recorded(tmp_path / "a") + second + recorded(tmp_path / "c"))
    assert_same_weights(folder / "ck", tmp_path / "c/ck")
