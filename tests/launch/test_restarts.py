"""Starts that a launcher repeats: how they are counted, and which are refused."""

import json
import os
from types import SimpleNamespace

import pytest

from smol.errors import UserError
from smol.heartbeat import Heartbeat
from smol.restarts import ATTEMPTS, HEARTBEAT, Attempts, refuse_crash_loop

BEAT = {
    "time": "2026-01-01T00:00:00+00:00",
    "step": 7,
    "position": 1792,
    "stage": "one",
    "context": 32,
    "global_batch": 256,
    "sources": {"cats": 0.7, "dogs": 0.3},
}


@pytest.fixture
def torchrun(monkeypatch):
    """The environment of a process that torchrun would start again."""
    monkeypatch.delenv("SMOL_SUPERVISED", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 1")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "100")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")


def log(folder, step):
    (folder / "metrics.csv").write_text(f"step,loss\n{step},1.0\n")


def beat(folder, **fields):
    (folder / HEARTBEAT).write_text(json.dumps(BEAT | fields))


def test_three_deaths_without_progress_are_one_too_many(torchrun, tmp_path):
    for _ in range(3):
        refuse_crash_loop(tmp_path, "auto")
        beat(tmp_path)
    with pytest.raises(UserError, match="crashed 3 times in a row without progress, each time in"):
        refuse_crash_loop(tmp_path, "auto")
    report = (tmp_path / "crash_report.txt").read_text()
    assert report.count("in step 7 at position 1,792 of stage one") == 4
    assert "context 32, batch 256, sources cats 0.7, dogs 0.3" in report
    assert "suspect its data" in report


def test_progress_begins_the_count_anew(torchrun, tmp_path):
    for step in (1, 1, 1, 2, 2, 2, 3):
        log(tmp_path, step)
        refuse_crash_loop(tmp_path, None)
    assert Attempts.count(tmp_path, "torchrun job 1").crashes == 1


def test_coming_as_far_as_before_is_no_progress(torchrun, tmp_path):
    """A run that goes on from a checkpoint takes rows back that it logged after it."""
    for step in (9, 5, 9):
        log(tmp_path, step)
        refuse_crash_loop(tmp_path, None)
    log(tmp_path, 8)
    with pytest.raises(UserError, match="each time before its first step"):
        refuse_crash_loop(tmp_path, None)


def test_another_launch_is_counted_anew(torchrun, tmp_path, monkeypatch):
    for _ in range(3):
        refuse_crash_loop(tmp_path, None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 2")
    refuse_crash_loop(tmp_path, None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what is not named is told by its process
    refuse_crash_loop(tmp_path, None)
    assert json.loads((tmp_path / ATTEMPTS).read_text())["launcher"].endswith(f"{os.getppid()}")


def test_different_places_speak_against_the_data(torchrun, tmp_path):
    for step in (3, 4, 5):
        refuse_crash_loop(tmp_path, None)
        beat(tmp_path, step=step)
    with pytest.raises(UserError, match="in step 3 .*; in step 4 .*; in step 5"):
        refuse_crash_loop(tmp_path, None)
    assert "suspect the machine" in (tmp_path / "crash_report.txt").read_text()


def test_a_preemption_is_no_crash(torchrun, tmp_path):
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path, datamodule=None)
    for _ in range(9):
        refuse_crash_loop(tmp_path, None)
        heartbeat = Heartbeat()
        heartbeat.on_train_start(trainer, None)
        heartbeat.on_exception(trainer, None, SystemExit(143))
        heartbeat.teardown(trainer, None, "fit")
    for _ in range(3):
        refuse_crash_loop(tmp_path, None)
    heartbeat.on_exception(trainer, None, RuntimeError("no"))
    with pytest.raises(UserError, match="crashed 3 times"):
        refuse_crash_loop(tmp_path, None)


@pytest.mark.parametrize(
    "change",
    [{"best": None}, {"best": ["x"]}, {"crashes": "many"}, {"deaths": 5}, {"added_later": 1}, None],
)
def test_a_count_of_another_version_is_no_obstacle(torchrun, tmp_path, change):
    refuse_crash_loop(tmp_path, None)
    found = json.loads((tmp_path / ATTEMPTS).read_text())
    found = {"launcher": found["launcher"]} if change is None else found | change
    (tmp_path / ATTEMPTS).write_text(json.dumps(found))
    refuse_crash_loop(tmp_path, None)
    known = ["launcher", "best", "crashes", "deaths"]
    assert list(json.loads((tmp_path / ATTEMPTS).read_text())) == known


def test_two_launches_may_count_at_once(tmp_path, monkeypatch):
    replace = os.replace

    def late(*paths):
        monkeypatch.setattr(os, "replace", replace)
        Attempts.count(tmp_path, "two")
        replace(*paths)

    monkeypatch.setattr(os, "replace", late)
    Attempts.count(tmp_path, "one")
    assert [path.name for path in tmp_path.iterdir()] == [ATTEMPTS]


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_files_that_a_crash_cut_off_are_no_obstacle(torchrun, tmp_path, cut):
    refuse_crash_loop(tmp_path, None)
    beat(tmp_path)
    for name in (HEARTBEAT, ATTEMPTS):
        (tmp_path / name).write_text((tmp_path / name).read_text()[:cut])
    refuse_crash_loop(tmp_path, None)


def test_a_person_may_start_as_often_as_they_like(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for _ in range(9):
        refuse_crash_loop(tmp_path, "scratch")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("start", ["scratch", "runs/other/checkpoints/step-1"])
def test_a_start_that_each_restart_would_repeat_is_refused(torchrun, tmp_path, start):
    with pytest.raises(UserError, match="would return to it each time; type --ckpt_path auto"):
        refuse_crash_loop(tmp_path, start)


def test_a_torchrun_whose_restarts_cannot_work_is_told_so(torchrun, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(UserError, match="type TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before"):
        refuse_crash_loop(tmp_path, None)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    refuse_crash_loop(tmp_path, "scratch")  # it starts nothing again
    assert list(tmp_path.iterdir()) == []
