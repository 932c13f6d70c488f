"""A real S3 server for the tests: SeaweedFS on 127.0.0.1."""

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

KEY, SECRET = "test-key", "test-secret"
RENEWED_KEY, RENEWED_SECRET = "renewed-key", "renewed-secret"
BUCKET = "smol-tests"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class ObjectStore:
    """An S3 server in a folder, with one bucket."""

    def __init__(self, folder: Path):
        self.folder = folder
        identity = {
            "name": "test",
            "credentials": [
                {"accessKey": KEY, "secretKey": SECRET},
                {"accessKey": RENEWED_KEY, "secretKey": RENEWED_SECRET},
            ],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.log = open(folder / "weed.log", "ab")  # noqa: SIM115
        for _ in range(3):  # a port that was free may have been taken since
            self._start()
            if self._answers():
                return
            self.process.kill()
            self.process.wait()
        self.log.close()
        raise RuntimeError((self.folder / "weed.log").read_text()[-2000:])

    def _start(self) -> None:
        """Start the server on ports that are free."""
        ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
        grpc = {f"{name}.port.grpc": free_port() for name in ports}
        self.port = ports["s3"]
        flags = {
            "dir": str(self.folder),
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            **{f"{name}.port": port for name, port in ports.items()},
            **grpc,
            "filer": "true",
            "s3": "true",
            "s3.config": str(self.folder / "s3.json"),
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "volume.max": 20,
            "master.volumeSizeLimitMB": 256,
        }
        weed = shutil.which("weed") or str(Path(os.sys.executable).parent / "weed")
        self.process = subprocess.Popen(
            [weed, "server", *(f"-{name}={value}" for name, value in flags.items())],
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        self.storage_options = {
            "key": KEY,
            "secret": SECRET,
            "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{self.port}"},
        }

    def _answers(self, seconds: float = 60) -> bool:
        """Wait until it has made its bucket; False where it ended or took too long."""
        import s3fs

        until = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < until:
            try:
                self.fs = s3fs.S3FileSystem(skip_instance_cache=True, **self.storage_options)
                self.fs.mkdir(BUCKET)
                return True
            except Exception:
                time.sleep(0.3)
        return False

    def upload(self, folder: Path, name: str) -> str:
        """Copy a folder into the bucket; returns its URL."""
        url = f"s3://{BUCKET}/{name}"
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.fs.put_file(str(file), f"{BUCKET}/{name}/{file.relative_to(folder)}")
        return url

    def stop(self) -> None:
        self.process.kill()  # it takes ten seconds to end by itself, and keeps nothing
        self.process.wait()
        self.log.close()
