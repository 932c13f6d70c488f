"""A run of other processes does not know whether there was a check; all of them hear of a fault."""

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from warm_python import python
from warmup_parts import (
    TRIAL,
    assert_same,
    files,
    fit,
    report,
    taken,  # noqa: F401
    tiny_data,
)

from callbacks.warmup_check import WarmupCheck
from smol.runs import newest_checkpoint


def launch(sources, folder, *jobs, devices=1, returncode=0):
    """Run jobs of the parts' script; returns what each process left of each, or its error."""
    script = Path(__file__).with_name("warmup_parts.py")
    jobs = [job | {"devices": devices} for job in jobs]
    done = python(script, sources, folder, json.dumps(jobs), ranks=devices)
    assert done.returncode == returncode, done.stderr[-3000:]
    return {job["folder"]: [read(folder, job, rank) for rank in range(devices)] for job in jobs}


def read(folder, job, rank):
    path = folder / f"{job['folder']}.rank{rank}"
    if not path.exists():
        return None
    return torch.load(path) if path.read_bytes()[:2] == b"PK" else path.read_text()


@pytest.mark.slow
def test_killed_inside_it_the_run_begins_it_again(sources, tmp_path, taken):
    whole = fit(sources, tmp_path / "whole/run", data=tiny_data(sources, global_batch_tokens=384))
    job = {"folder": "broken/run", "check": TRIAL, "fault": "kill"}
    folder = tmp_path / "broken/run"
    assert launch(sources, tmp_path, job, returncode=-signal.SIGKILL) == {"broken/run": [None]}
    assert not files(folder)
    assert newest_checkpoint(folder) is None
    data = tiny_data(sources, global_batch_tokens=384)
    again = fit(sources, folder, WarmupCheck(**TRIAL), data=data)
    assert len(taken) == 10
    assert_same(again, whole)
    assert files(folder) == files(tmp_path / "whole/run")


FAULTS = [
    ("token", {}, r"data: token 5000 is not in the vocabulary of 384 \(step 0\) \(process 1\)"),
    ("sums", {}, "collectives: 1 of 4,194,304 sums are wrong in process 1, expected right sums;"),
    ("same rows", {}, "data: .* 100% of the rows of a process are another's too, expected"),
    (None, {"least_gigabytes_per_second": 1e6}, "collectives: right sums over 2 .* GB/s, expected"),
]


@pytest.fixture(scope="module")
def two_ranks(sources, tmp_path_factory):
    """A folder with runs of two processes, and what each of them left."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [
        {"folder": f"{strategy}/{name}/run", "strategy": strategy, "check": check}
        for strategy in ("ddp", "fsdp2")
        for name, check in {"without": None, "with": TRIAL}.items()
    ]
    for number, (fault, check, _) in enumerate(FAULTS):
        job = {"folder": f"fault{number}/run", "strategy": "ddp", "fault": fault}
        jobs.append(job | {"check": TRIAL | check})
    return folder, launch(sources, folder, *jobs, devices=2)


def assert_same_on_all(folder, left, name, devices):
    runs = [left[f"{name}/{kind}/run"] for kind in ("with", "without")]
    for a, b in zip(*runs, strict=True):
        assert_same(a, b)
    assert files(folder / name / "with/run") == files(folder / name / "without/run")
    found = report(folder / name / "with/run")
    assert found["passed"]
    assert found["collectives"]["values"]["processes"] == devices
    assert found["collectives"]["values"]["bus_gigabytes_per_second"] > 0
    assert found["data"]["values"]["shared_rows"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_are_the_same_with_and_without(two_ranks, strategy):
    assert_same_on_all(*two_ranks, strategy, devices=2)


@pytest.mark.slow
def test_three_processes_are_the_same_with_and_without(sources, tmp_path):
    """They add up in an order that depends on what DDP has seen before."""
    jobs = [
        {"folder": f"ddp/{name}/run", "strategy": "ddp", "check": check}
        for name, check in {"without": None, "with": TRIAL}.items()
    ]
    left = launch(sources, tmp_path, *jobs, devices=3)
    assert_same_on_all(tmp_path, left, "ddp", devices=3)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_all_processes_stop_with_what_is_wrong_between_them(two_ranks, number):
    folder, left = two_ranks
    first, second = left[f"fault{number}/run"]
    assert first == second
    assert re.search(FAULTS[number][2], first)
    assert not report(folder / f"fault{number}/run")["passed"]
