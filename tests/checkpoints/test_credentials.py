"""Credentials that expire while a run uploads, and are renewed beside it."""

import json
import sys
from datetime import UTC, datetime, timedelta

import pytest
import torch
from faulty_proxy import FaultyProxy
from object_store import BUCKET, KEY, RENEWED_KEY, RENEWED_SECRET, SECRET

from smol.checkpoints.format import write_checkpoint
from smol.checkpoints.replicas import RemoteRuns
from smol.checkpoints.rotation import Rotation
from smol.checkpoints.store import FsspecStore

PATIENT = 20.0
FILE = "[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n"
PROCESS = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
with open(folder / "asked", "a") as file:
    file.write("x")
print((folder / "credentials.json").read_text())
"""
pytestmark = pytest.mark.s3


@pytest.fixture
def proxy(s3):
    proxy = FaultyProxy(s3.port)
    yield proxy
    proxy.stop()


@pytest.fixture
def rotation(proxy, tmp_path, monkeypatch):
    """A rotation whose store takes credentials from where AWS's tools do."""
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    options = {
        "client_kwargs": {"endpoint_url": proxy.url},
        "config_kwargs": {"retries": {"max_attempts": 0}},
    }
    runs = RemoteRuns(f"s3://{BUCKET}/{tmp_path.name}", options)
    made = []

    def start():
        rotation = Rotation(FsspecStore(tmp_path / "run/checkpoints"), runs.of("run"))
        rotation.mirror.pause = 0.05, 0.2
        rotation.begin()
        made.append(rotation)
        return rotation

    yield start
    for rotation in made:
        rotation.stop()


def save(rotation, step):
    content = {"state_dict": {"w": torch.full((512,), float(step))}}
    rotation.save(step, lambda folder: write_checkpoint(folder, content), {})


def expire(proxy, status=400):
    """What is signed with the old key is refused from now on."""
    proxy.fault = lambda request: status if request.key == KEY else None


def steps(rotation):
    return [info.manifest.step for info in rotation.mirror.remote.list()]


@pytest.mark.parametrize("status", [400, 403])
def test_a_credentials_file_that_is_replaced_is_read_again(rotation, proxy, tmp_path, status):
    (tmp_path / "credentials").write_text(FILE.format(KEY, SECRET))
    running = rotation()
    save(running, 1)
    assert running.mirror.flush(PATIENT)
    expire(proxy, status)
    save(running, 2)
    assert not running.mirror.flush(1.0)
    failed = [news.message for news in running.news() if news.kind == "upload_failed"]
    assert "PermissionError" in failed[0]
    (tmp_path / "credentials").write_text(FILE.format(RENEWED_KEY, RENEWED_SECRET))
    assert running.mirror.flush(PATIENT)  # nobody has to wake or restart anything
    assert steps(running) == [1, 2]


def test_credentials_that_a_process_gives_are_asked_for_again(rotation, proxy, tmp_path):
    """botocore asks for them again before they expire; no upload fails."""

    def give(key, secret):
        expires = datetime.now(UTC) + timedelta(minutes=5)
        answer = {"Version": 1, "AccessKeyId": key, "SecretAccessKey": secret}
        answer |= {"SessionToken": "", "Expiration": expires.isoformat()}
        (tmp_path / "credentials.json").write_text(json.dumps(answer))

    (tmp_path / "process.py").write_text(PROCESS)
    command = f"{sys.executable} {tmp_path / 'process.py'} {tmp_path}"
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {command}\n")
    give(KEY, SECRET)
    running = rotation()
    save(running, 1)
    assert running.mirror.flush(PATIENT)
    give(RENEWED_KEY, RENEWED_SECRET)
    expire(proxy)
    save(running, 2)
    assert running.mirror.flush(PATIENT)
    assert steps(running) == [1, 2]
    assert [news.kind for news in running.news() if news.kind == "upload_failed"] == []
    assert len((tmp_path / "asked").read_text()) > 1


def test_a_run_that_never_had_credentials_saves_locally_and_uploads_once_it_has(
    rotation, proxy, tmp_path, monkeypatch
):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    running = rotation()
    save(running, 1)
    assert not running.mirror.flush(0.5)
    assert "NoCredentials" in running.news()[-1].message
    (tmp_path / "credentials").write_text(FILE.format(KEY, SECRET))
    assert running.mirror.flush(PATIENT)
    assert steps(running) == [1]
