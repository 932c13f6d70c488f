"""Checkpoints on a real S3 server, with a network that does what it wants."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from faulty_proxy import FaultyProxy
from object_store import BUCKET

from smol.checkpoints.fence import Fence, FencedError
from smol.checkpoints.format import read_checkpoint, write_checkpoint
from smol.checkpoints.mirror import abort_multipart_uploads
from smol.checkpoints.replicas import RemoteRuns, Replicas
from smol.checkpoints.retention import Retention, is_pinned
from smol.checkpoints.rotation import Rotation
from smol.checkpoints.store import FsspecStore
from smol.errors import UserError

PATIENT = 20.0  # seconds; a busy machine is not a failed test
pytestmark = pytest.mark.s3


@pytest.fixture
def proxy(s3):
    proxy = FaultyProxy(s3.port)
    yield proxy
    proxy.stop()


@pytest.fixture
def runs(s3, proxy, tmp_path):
    """Where the runs of one test are safe, behind the proxy."""
    options = s3.storage_options | {
        "client_kwargs": {"endpoint_url": proxy.url},
        "config_kwargs": {"retries": {"max_attempts": 0}, "read_timeout": 1},
    }
    return RemoteRuns(f"s3://{BUCKET}/{tmp_path.name}", options)


@pytest.fixture
def local(tmp_path):
    return FsspecStore(tmp_path / "run/checkpoints")


@pytest.fixture
def rotate(runs, local):
    made = []

    def make(**kwargs):
        rotation = Rotation(local, runs.of("run"), **kwargs)
        rotation.mirror.pause = 0.05, 0.2
        rotation.begin()
        made.append(rotation)
        return rotation

    yield make
    for rotation in made:
        rotation.stop()


def writer(step):
    weights = torch.full((512,), float(step))
    return lambda folder: write_checkpoint(folder, {"state_dict": {"w": weights}})


def save(rotation, step, **kwargs):
    return rotation.save(step, writer(step), {}, **kwargs)


def steps(store):
    return [info.manifest.step for info in store.list()]


def kinds(rotation):
    return [news.kind for news in rotation.news()]


def wait_for(condition):
    until = time.monotonic() + PATIENT
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    assert condition()


def newest(runs, local):
    found = Replicas(local, runs.of("run", local.root), pause=0).newest()
    weights = read_checkpoint(found[1])["state_dict"]["w"]
    assert torch.equal(weights, torch.full((512,), float(found[0].manifest.step)))
    return found[0].manifest.step


def test_what_is_safe_goes_locally_but_for_one(rotate, runs, local):
    rotation = rotate(retention=Retention(2, keep_every=10))
    for step in (8, 10, 12, 14, 16):
        save(rotation, step, pinned=step == 12)
        assert rotation.mirror.flush(PATIENT)
    remote = runs.of("run")
    wait_for(lambda: steps(remote) == [10, 12, 14, 16])
    rotation.finish(PATIENT)
    assert steps(local) == [16]
    assert [is_pinned(remote, info.key) for info in remote.list()] == [False, True, False, False]
    assert rotation.mirror.age_of_durable < 60
    assert rotation.mirror.uploaded_bytes > 5 * 4 * 512
    assert kinds(rotation).count("uploaded") == 5
    shutil.rmtree(Path(local.root).parent)
    assert newest(runs, local) == 16
    assert steps(local) == [16]  # what was downloaded is a checkpoint of the run again


def once(*, method, name, fault, times=1):
    """A fault of the first requests of a kind."""
    left = [times]

    def choose(request):
        if request.method == method and name in request.path and left[0]:
            left[0] -= 1
            return fault
        return None

    return choose


@pytest.mark.parametrize(
    ("method", "name", "fault"),
    [
        ("PUT", "model.safetensors", 503),
        ("PUT", "model.safetensors", "cut"),
        ("PUT", "model.safetensors", "flip_up"),
        ("PUT", "model.safetensors", "stall"),
        ("PUT", "manifest.json", "cut"),
        ("PUT", "COMMITTED", "cut"),
        ("PUT", "COMMITTED", 500),
        ("PUT", "writers", "cut"),
        ("GET", "model.safetensors", "flip"),
        ("GET", "model.safetensors", "cut_body"),
        ("GET", "list-type", 503),
        ("HEAD", "COMMITTED", 403),
        ("DELETE", "COMMITTED", 503),
    ],
)
def test_a_fault_delays_and_nothing_more(rotate, runs, local, proxy, method, name, fault):
    proxy.fault = once(method=method, name=name, fault=fault, times=2)
    rotation = rotate()
    for step in (1, 2, 3):
        began = time.monotonic()
        save(rotation, step)
        assert time.monotonic() - began < 5  # the training waits for the local copy alone
        assert rotation.mirror.flush(PATIENT)
    wait_for(lambda: steps(runs.of("run")) == [2, 3])
    rotation.finish(PATIENT)
    assert steps(local) == [3]
    for info in runs.of("run").list():
        runs.of("run").verify(info)


@pytest.mark.parametrize("what", ["everything", "put", "list", "delete"])
def test_permissions_that_are_gone_stop_nothing(rotate, runs, local, proxy, what):
    """Expired credentials look the same. What is there stays; it goes on when they are back."""
    rotation = rotate()
    for step in (1, 2):
        save(rotation, step)
        assert rotation.mirror.flush(PATIENT)
    denied = {
        "everything": lambda request: True,
        "put": lambda request: request.method == "PUT",
        "list": lambda request: request.is_list,
        "delete": lambda request: request.is_delete,
    }[what]
    proxy.fault = lambda request: 403 if denied(request) else None
    before, news = len(proxy.requests), []

    def is_refused():
        news.extend(item for item in rotation.news() if item.kind == "upload_failed")
        return any("PermissionError" in n.message or "Forbidden" in n.message for n in news)

    for step in (3, 4, 5):
        save(rotation, step)
        rotation.mirror.flush(0.7)
    wait_for(is_refused)
    assert len(proxy.requests) - before < 600  # it waits between attempts
    if what == "delete":
        wait_for(lambda: 5 in steps(runs.of("run")))
    else:
        # At least two verified ones here, and those in the store.
        assert steps(local)[-2:] == [4, 5]
        local.verify(local.list()[-1])
    proxy.fault = lambda request: None
    rotation.mirror.wake()
    wait_for(lambda: steps(runs.of("run")) == [4, 5])
    rotation.finish(PATIENT)
    assert steps(local) == [5]


def test_the_older_of_two_writers_stops_before_its_next_commit(rotate, runs, local, tmp_path):
    older = rotate()
    save(older, 1)
    assert older.mirror.flush(PATIENT)
    other = FsspecStore(tmp_path / "another machine/checkpoints")
    newer = Rotation(other, runs.of("run"))
    newer.begin()
    newer.save(2, writer(2), {})
    assert newer.mirror.flush(PATIENT)
    save(older, 3)
    older.finish(PATIENT)
    assert older.fenced
    assert save(older, 4) is None
    (fenced,) = [news for news in older.news() if news.kind == "fenced"]
    assert "another process has taken over" in fenced.message
    assert f'"process": {os.getpid()}' in fenced.message
    assert steps(runs.of("run")) == [1, 2]
    newer.finish(PATIENT)
    newer.stop()


def test_of_many_that_claim_at_once_one_is_left(s3, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    runs = RemoteRuns(f"s3://{BUCKET}/{tmp_path.name}", s3.storage_options)
    fences = [Fence(runs.of("run")) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda fence: fence.claim(), fences))

    def is_left(fence):
        try:
            fence.check()
        except FencedError:
            return False
        return True

    # Also where a server lets two create the same object: what it says in the end decides.
    (last,) = [fence for fence in fences if is_left(fence)]
    assert last.number == max(fence.number for fence in fences)


def test_a_local_folder_has_one_writer_too(local):
    older, newer = Rotation(local), Rotation(local)
    older.begin()
    save(older, 1)
    newer.begin()
    save(newer, 2)
    assert save(older, 3) is None
    assert kinds(older) == ["saved", "fenced"]
    assert steps(local) == [1, 2]
    shutil.rmtree(local.root)
    save(newer, 4)  # whoever finds its claim deleted claims again
    assert steps(local) == [4]


def test_a_local_folder_that_is_deleted_costs_what_was_not_safe(rotate, runs, local, proxy):
    rotation = rotate()
    save(rotation, 1)
    assert rotation.mirror.flush(PATIENT)
    proxy.fault = lambda request: 503 if request.method == "PUT" else None
    save(rotation, 2)
    rotation.mirror.flush(0.3)
    shutil.rmtree(Path(local.root).parent)  # between the save and its upload
    assert newest(runs, local) == 1
    proxy.fault = lambda request: None
    save(rotation, 3)
    assert rotation.mirror.flush(PATIENT)
    assert steps(runs.of("run")) == [1, 3]


def test_a_file_that_goes_during_its_upload_is_not_committed(rotate, runs, local, proxy):
    def choose(request):
        if request.method == "PUT" and "model.safetensors" in request.path:
            shutil.rmtree(local.root)

    proxy.fault = choose
    rotation = rotate()
    save(rotation, 1)
    assert rotation.mirror.flush(PATIENT)
    assert steps(runs.of("run")) == []
    (news,) = [news for news in rotation.news() if news.kind == "upload_failed"]
    assert "its local copy is damaged or gone" in news.message


def test_a_local_copy_that_rots_is_not_uploaded(rotate, runs, local, proxy):
    proxy.fault = lambda request: 503 if request.method == "PUT" else None
    rotation = rotate()
    for step in (1, 2):
        info = save(rotation, step)
    path = Path(local.root, info.key, "model.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    proxy.fault = lambda request: None
    rotation.mirror.wake()
    assert rotation.mirror.flush(PATIENT)
    assert steps(runs.of("run")) == [1]


def test_local_copies_that_wait_keep_to_a_budget(rotate, local, proxy):
    proxy.fault = lambda request: 503
    rotation = rotate(retention=Retention(2, keep_every=1), waiting_bytes=9000)
    for step in range(1, 7):
        save(rotation, step, pinned=step == 2)
    assert steps(local) == [2, 4, 5, 6]  # of 2,200 bytes each
    assert kinds(rotation).count("dropped") == 2
    rotation.mirror.waiting_bytes = 1
    save(rotation, 7)
    assert steps(local)[-2:] == [6, 7]  # two, as long as nothing is safe
    assert 2 in steps(local)
    proxy.fault = lambda request: None
    rotation.mirror.wake()
    assert rotation.mirror.flush(PATIENT)


def test_the_next_start_finishes_what_was_left(rotate, runs, local, proxy, s3):
    remote = runs.of("run")
    proxy.fault = lambda request: 503 if "COMMITTED" in request.path else None
    first = rotate()
    save(first, 1)
    first.mirror.flush(0.5)
    first.stop()
    bucket, prefix, _ = s3.fs.split_path(remote.root)
    upload = {"Bucket": bucket, "Key": f"{prefix}/step-00000009-aaaaaaaa/model.safetensors"}
    s3.fs.call_s3("create_multipart_upload", **upload)
    other = {"Bucket": bucket, "Key": f"{prefix}-of-somebody-else/file"}
    s3.fs.call_s3("create_multipart_upload", **other)
    parts = {f"{remote.root}/step-00000009-aaaaaaaa/{i}": b"x" for i in range(1100)}
    s3.fs.pipe(parts)
    proxy.fault = lambda request: None
    second = rotate()
    wait_for(lambda: not second.mirror._dirty)
    second.finish(PATIENT)
    assert steps(runs.of("run")) == [1]
    s3.fs.invalidate_cache()
    assert not [p for p in s3.fs.find(remote.root) if "step-00000009" in p]
    left = s3.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)["Uploads"]
    assert [upload["Key"] for upload in left] == [other["Key"]]
    assert abort_multipart_uploads(s3.fs, f"{remote.root}-of-somebody-else") == 1


def test_what_was_resumed_from_stays(rotate, runs, local):
    first = rotate()
    resumed = save(first, 1)
    first.finish(PATIENT)
    second = rotate(resumed=Path(local.root, resumed.key))
    for step in (2, 3, 4):
        save(second, step)
        assert second.mirror.flush(PATIENT)
    wait_for(lambda: steps(runs.of("run")) == [1, 3, 4])
    second.finish(PATIENT)


# -- restoring -------------------------------------------------------------------------------------


@pytest.fixture
def remote(runs, tmp_path):
    store = FsspecStore(f"{runs.url}/run", tmp_path / "cache", runs.storage_options)
    for step in (1, 2):
        store.save(step, writer(step), {})
    return store


def flip(content):
    return content[:99] + bytes([content[99] ^ 1]) + content[100:]


@pytest.mark.parametrize(
    "edit", [flip, lambda c: b"", lambda c: c[: len(c) // 2], lambda c: c[:-9] + bytes(9)]
)
def test_damage_in_the_store_falls_back_to_the_one_before(remote, runs, local, edit):
    path = f"{remote.root}/{remote.list()[-1].key}/model.safetensors"
    remote.fs.pipe_file(path, edit(remote.fs.cat_file(path)))
    assert newest(runs, local) == 1


@pytest.mark.parametrize("fault", [503, "cut_body", "flip", "cut", 403])
def test_what_goes_wrong_on_the_way_is_tried_again(remote, runs, local, proxy, fault):
    proxy.fault = once(method="GET", name="model.safetensors", fault=fault)
    assert newest(runs, local) == 2


def test_a_damaged_local_copy_is_replaced_by_the_one_in_the_store(remote, runs, local):
    assert newest(runs, local) == 2
    path = Path(local.root, local.list()[0].key, "model.safetensors")
    path.write_bytes(flip(path.read_bytes()))
    assert newest(runs, local) == 2
    local.verify(local.list()[0])


def test_an_unreachable_store_is_told(remote, runs, local, proxy, caplog, monkeypatch):
    monkeypatch.setattr("smol.checkpoints.replicas.ATTEMPTS", 1)
    proxy.fault = lambda request: 503
    replicas = Replicas(local, runs.of("run", local.root), pause=0)
    with pytest.raises(UserError, match="cannot be read: .*there is no local checkpoint") as error:
        replicas.newest()
    assert "\n" not in str(error.value)
    local.save(1, writer(1), {})
    assert newest(runs, local) == 1
    assert "only local checkpoints are considered" in caplog.text
