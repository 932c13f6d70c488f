"""The command line over checkpoints."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from smol.checkpoints.command import main
from smol.checkpoints.format import write_checkpoint
from smol.checkpoints.replicas import RemoteRuns
from smol.checkpoints.retention import is_pinned
from smol.checkpoints.store import FsspecStore
from smol.paths import project_root


def save(store, step, **metadata):
    content = {"state_dict": {"w": torch.full((9,), float(step))}, "global_step": step}
    return store.save(step, lambda folder: write_checkpoint(folder, content), metadata)


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of steps 1 to 5, of which the first two are in the store only."""
    local = FsspecStore(tmp_path / "runs/tiny/checkpoints")
    remote = RemoteRuns(str(tmp_path / "safe")).of("tiny")
    for step in range(1, 6):
        info = save(local, step, tokens=256 * step)
        remote.upload(tmp_path / "runs/tiny/checkpoints" / info.key, info.key, info.manifest)
    for info in local.list()[:2]:
        local.delete(info)
    return tmp_path / "runs/tiny"


def call(capsys, *words):
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert err.count("\n") <= 1
    return status, out, err


def rows(capsys, *words):
    status, out, err = call(capsys, *words, "--json")
    assert not err
    return status, json.loads(out)


def test_list(run, capsys, tmp_path):
    status, found = rows(capsys, "list", run)
    assert status == 0
    assert [(row["step"], row["tokens"], row["where"]) for row in found] == [
        *((3, 768, "local"), (4, 1024, "local"), (5, 1280, "local"))
    ]
    _, found = rows(capsys, "list", run, "--store", tmp_path / "safe")
    assert [row["where"] for row in found] == ["store"] * 2 + ["local+store"] * 3
    _, text, _ = call(capsys, "list", tmp_path / "safe/tiny")
    lines = text.splitlines()
    assert lines[0].split() == "key lineage step tokens bytes created where pinned parent".split()
    assert len(lines) == 6
    assert "1,280" in lines[-1]


def test_verify_says_which_copy_is_damaged(run, capsys, tmp_path):
    words = ("verify", run, "--store", tmp_path / "safe")
    status, found = rows(capsys, *words)
    assert status == 0
    assert found[-1] == {"key": found[-1]["key"], "local": "whole", "store": "whole"}
    path = run / "checkpoints" / found[-1]["key"] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    status, found = rows(capsys, *words)
    assert status == 1
    assert "model.safetensors is damaged: it has" in found[-1]["local"]
    assert found[-1]["store"] == "whole"
    status, found = rows(capsys, "verify", run, "4", "--store", tmp_path / "safe")
    assert (status, len(found)) == (0, 1)


def test_verify_sees_damaged_manifests(run, capsys, tmp_path):
    keys = [path.name for path in sorted((run / "checkpoints").iterdir())]
    for key in keys:
        (run / "checkpoints" / key / "manifest.json").write_text("{}")
    status, found = rows(capsys, "verify", run)
    assert (status, [row["key"] for row in found]) == (1, keys)
    assert all("manifest.json is damaged" in row["local"] for row in found)
    assert rows(capsys, "verify", run, keys[1]) == (1, found[1:2])
    status, found = rows(capsys, "verify", run, "5", "--store", tmp_path / "safe")
    assert status == 1
    assert "manifest.json is damaged" in found[0]["local"]
    assert found[0]["store"] == "whole"


def test_pins_and_prune(run, capsys, tmp_path):
    both = (run, "--store", tmp_path / "safe")
    remote = RemoteRuns(str(tmp_path / "safe")).of("tiny")
    _, found = rows(capsys, "pin", *both, "1", "4")
    assert [row["pinned"] for row in found] == [True, True]
    assert is_pinned(remote, found[0]["key"])
    _, found = rows(capsys, "prune", *both, "--dry_run")
    expected = [(3, "local"), (2, "store"), (3, "store")]
    assert [(row["step"], row["removed from"]) for row in found] == expected
    assert len(remote.list()) == 5
    rows(capsys, "prune", *both)
    assert [info.manifest.step for info in remote.list()] == [1, 4, 5]
    rows(capsys, "unpin", *both, "1")
    rows(capsys, "prune", *both)
    assert [info.manifest.step for info in remote.list()] == [4, 5]
    rows(capsys, "pin", run, "5")  # locally alone
    save(FsspecStore(run / "checkpoints"), 6)
    save(remote, 6)
    save(remote, 7)
    rows(capsys, "prune", *both)
    assert [info.manifest.step for info in remote.list()] == [4, 5, 6, 7]
    assert call(capsys, "prune", *both)[1] == "nothing\n"


def test_what_the_newest_was_resumed_from_is_not_pruned(tmp_path, capsys):
    store = FsspecStore(tmp_path / "run/checkpoints")
    first = save(store, 1)
    for step in range(2, 5):
        save(store, step, parent=first.key)
    rows(capsys, "prune", tmp_path / "run")
    assert [info.manifest.step for info in store.list()] == [1, 3, 4]


def test_restore(run, capsys, tmp_path):
    _, (row,) = rows(capsys, "restore", tmp_path / "safe/tiny", "2", "--to", tmp_path / "there")
    assert FsspecStore(tmp_path / "there").list()[0].manifest.step == 2
    assert row["to"] == str(tmp_path / "there" / row["key"])
    shutil.rmtree(run)
    run.mkdir()
    status, out, err = call(capsys, "restore", run, "--store", tmp_path / "safe")
    assert status == 0, err
    (info,) = FsspecStore(run / "checkpoints").list()
    assert info.manifest.step == 5
    assert info.location in out
    FsspecStore(run / "checkpoints").verify(info)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list", "{tmp}/nowhere"], "nowhere is not there; expected a run's folder"),
        (["verify", "{run}", "99"], "holds no checkpoint 99"),
        (["pin", "{run}", "step-0"], "is one of step-00000003"),
        (["restore", "{tmp}/empty"], "holds no checkpoint"),
        (["prune", "{run}", "--keep", "1"], "keep is 1; at least 2"),
        (["restore", "memory://nowhere/x"], "holds no checkpoint"),
        (["list", "nonsense://x"], "nonsense"),
    ],
)
def test_mistakes_are_one_line(run, capsys, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    status, out, err = call(capsys, *[word.format(tmp=tmp_path, run=run) for word in words])
    assert status == 2
    assert not out
    assert err.startswith("error: ")
    assert message in err


def test_the_script(run):
    script = project_root() / "src/checkpoints.py"
    command = [sys.executable, str(script), "list", str(run)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
