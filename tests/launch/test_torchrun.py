"""Two processes under torchrun: killed and started again, and stopped when that leads nowhere."""

import pytest
from launch_parts import (
    RANKS,
    TORCHRUN,
    assert_equal,
    events,
    faults,
    final_weights,
    fit,
    run,
    write_config,
)
from warm_python import python

STEPS = 24
ALONE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def torchrun(*words, restarts=100, **environment):
    options = ["--standalone", "--nproc-per-node", 2, "--max-restarts", restarts]
    return run([*TORCHRUN, *options, *words], **environment)


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    """The weights that two processes end with when nothing happens to them."""
    folder = tmp_path_factory.mktemp("whole")
    done = python(*fit(write_config(folder, "whole", sources, STEPS), *RANKS), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return final_weights(folder / "runs/whole")


@pytest.mark.slow
def test_a_rank_that_is_killed_costs_nothing(sources, tmp_path, whole):
    kill = faults({"kind": "kill", "step": 10, "rank": 1})
    config = write_config(tmp_path, "killed", sources, STEPS)
    done = torchrun(*fit(config, *RANKS, *kill), **ALONE)
    assert done.returncode == 0, done.stderr[-3000:]
    starts = events(tmp_path / "runs/killed", "start", "fault")
    assert starts == [("start", 0), ("fault", 10), ("start", 8)]
    assert_equal(final_weights(tmp_path / "runs/killed"), whole)


@pytest.mark.slow
def test_a_rank_that_always_dies_on_the_same_data_ends_the_run_with_a_report(sources, tmp_path):
    kill = faults({"kind": "kill", "step": 10, "rank": 1, "times": 99})
    config = write_config(tmp_path, "loop", sources, STEPS)
    done = torchrun(*fit(config, *RANKS, *kill), **ALONE)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr[-3000:]
    place = "in step 10 at position 2,560 of stage one"
    assert f"crashed 3 times in a row without progress, each time {place}." in said[0]
    folder = tmp_path / "runs/loop"
    assert str(folder / "crash_report.txt") in said[0]
    report = (folder / "crash_report.txt").read_text()
    assert report.count(place) == 4
    assert "context 32, batch 256, sources cats 1" in report
    assert "last checkpoint  step 8, lineage 0" in report
    assert "suspect its data" in report
    # Four starts died; the fifth was refused, and took torchrun along.
    assert events(folder, "start") == [("start", 0)] + 3 * [("start", 8)]
