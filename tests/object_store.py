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
        self.folder, self.port = folder, free_port()
        identity = {
            "name": "test",
            "credentials": [
                {"accessKey": KEY, "secretKey": SECRET},
                {"accessKey": RENEWED_KEY, "secretKey": RENEWED_SECRET},
            ],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        weed = shutil.which("weed") or str(Path(os.sys.executable).parent / "weed")
        ports = {name: free_port() for name in ("master", "volume", "filer")}
        grpc = {f"{name}.port.grpc": free_port() for name in (*ports, "s3")}
        flags = {
            "dir": str(folder),
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            **{f"{name}.port": port for name, port in ports.items()},
            **grpc,
            "filer": "true",
            "s3": "true",
            "s3.port": self.port,
            "s3.config": str(folder / "s3.json"),
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "volume.max": 20,
            "master.volumeSizeLimitMB": 256,
        }
        self.log = open(folder / "weed.log", "wb")  # noqa: SIM115
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
        self._wait()

    def _wait(self, seconds: float = 60) -> None:
        import s3fs

        until = time.monotonic() + seconds
        while True:
            try:
                self.fs = s3fs.S3FileSystem(skip_instance_cache=True, **self.storage_options)
                self.fs.mkdir(BUCKET)
                return
            except Exception:
                if time.monotonic() > until or self.process.poll() is not None:
                    self.stop()
                    raise RuntimeError((self.folder / "weed.log").read_text()[-2000:]) from None
                time.sleep(0.3)

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
