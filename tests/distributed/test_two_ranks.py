"""Two processes equal one: rows, gradients, and checkpoints across numbers of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_ranks import run

STEPS = 6


def launch(sources, folder, **options):
    """Run on two ranks; returns the optimiser steps, the rows of both ranks together."""
    folder.mkdir(exist_ok=True)
    options = {"sources": sources, "folder": folder, "output": folder, "steps": STEPS} | options
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests / "data"), os.environ.get("PYTHONPATH", "")])
    script = Path(__file__).with_name("train_ranks.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(options, default=str)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    for a, b in zip(*ranks, strict=True):
        assert not {tuple(r) for r in a["rows"]} & {tuple(r) for r in b["rows"]}
    return [a | {"rows": sorted(a["rows"] + b["rows"])} for a, b in zip(*ranks, strict=True)]


def single(sources, folder, **options):
    options = {"strategy": "single", "steps": STEPS, "micro": 256} | options
    steps = run(sources, folder, **options)[1]
    return [step | {"rows": sorted(step["rows"])} for step in steps]


def assert_same(a, b):
    assert [step["rows"] for step in a] == [step["rows"] for step in b]
    assert [s["norm"] for s in a] == pytest.approx([s["norm"] for s in b], rel=2e-4)
    assert a[-1]["bits_per_byte"] == pytest.approx(b[-1]["bits_per_byte"], rel=1e-4)


def assert_same_weights(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        # Adam turns the last bits of a tiny gradient into whole steps of a hundredth each.
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_equal_one(sources, tmp_path, strategy):
    """Uneven masks, a change of context on the way, and a change of accumulation beside it."""
    whole = single(sources, tmp_path / "one", uneven=True, save=tmp_path / "one/ck")
    options = {"strategy": strategy, "uneven": True, "save": tmp_path / "two/ck"}
    both = launch(sources, tmp_path / "two", micro=64, **options)
    assert_same(whole, both)
    assert_same_weights(tmp_path / "one/ck", tmp_path / "two/ck")


@pytest.mark.slow
def test_a_run_moves_between_one_rank_and_two(sources, tmp_path):
    whole = single(sources, tmp_path / "whole", uneven=False, save=tmp_path / "whole/ck")
    options = {"strategy": "fsdp2", "micro": 128, "uneven": False}
    save = tmp_path / "a/ck"
    first = launch(sources, tmp_path / "a", **options, steps=2, save=save)
    second = single(
        sources, tmp_path / "b", uneven=False, steps=4, resume=save, save=tmp_path / "b/ck"
    )
    save = tmp_path / "c/ck"
    third = launch(sources, tmp_path / "c", **options, resume=tmp_path / "b/ck", save=save)
    assert_same(whole, first + second + third)
    assert_same_weights(tmp_path / "whole/ck", tmp_path / "c/ck")
