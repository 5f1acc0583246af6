"""What every file system that is compared can do, and helpers to run the programs that it is made of."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Final, TypeVar

from fuseclient import mounts

WAIT_S: Final = 60.0


class Peer(ABC):
    """One new volume, with all its files below ``directory``. It can be started and stopped any number of times."""

    name: ClassVar[str]
    #: What is on the disk when a file was closed, and when it was fsynced.
    durability: ClassVar[str]
    #: Its measured mounts cannot be written to: it is filled through another.
    read_only: ClassVar[bool] = False
    #: It differs from another only in what a change costs, so that only changes are measured.
    changes_only: ClassVar[bool] = False
    #: It differs from another only in where metadata are, so that large files are not measured.
    metadata_only: ClassVar[bool] = False
    #: It can be read and written with O_DIRECT.
    direct_io: ClassVar[bool] = True

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "mnt"
        self.root.mkdir()

    @classmethod
    def missing(cls) -> str | None:
        """Return what it wants and this machine has not; None: it can be measured."""
        return None

    @classmethod
    @abstractmethod
    def version(cls) -> str:
        """Return what is measured, with its version."""

    @abstractmethod
    def start(self, *, ttl_s: float | None = None, writing: bool = False) -> None:
        """Start every daemon and mount at ``root``.

        ``ttl_s``: how long the kernel may answer names and attributes by itself; None: what the peer does by default.
        ``writing``: a read-only peer is mounted to be filled.
        """

    @abstractmethod
    def stop(self) -> None:
        """Unmount, and end every daemon."""

    def restart(self, *, ttl_s: float | None = None) -> float:
        """Make it cold: daemons new, page cache and dentries dropped. Return the seconds of the start.

        What it keeps on disk, caches too, stays: it is as after a restart of the machine.
        """
        self.stop()
        drop_kernel_caches()
        start = time.monotonic()
        self.start(ttl_s=ttl_s)
        return time.monotonic() - start

    def processes(self) -> dict[str, int]:
        """Return its processes by what they are."""
        return {}


_P = TypeVar("_P", bound=Peer)


@contextlib.contextmanager
def fresh(kind: type[_P], directory: Path) -> Iterator[_P]:
    """Make a new volume of a kind, started so that it can be filled; remove it at the end."""
    with tempfile.TemporaryDirectory(dir=directory, prefix=kind.name.replace(" ", "-")) as name:
        peer = kind(Path(name))
        try:
            peer.start(writing=True)
            yield peer
        finally:
            peer.stop()


def drop_kernel_caches() -> None:
    """Write what is dirty, and drop the page cache, dentries and inodes of the whole machine."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def program(name: str) -> str | None:
    """Return the path of a program: of this environment, or of the machine."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def need(name: str) -> str:
    """Return the path of a program that is there."""
    found = program(name)
    if found is None:
        raise FileNotFoundError(name)
    return found


def run(*command: str | Path, log: Path | None = None) -> None:
    """Run a program that must succeed."""
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if log is not None:
        log.write_bytes(done.stdout)
    if done.returncode:
        text = done.stdout.decode(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}: {text}")


def output(*command: str) -> str:
    """Return the first line that a program prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.stdout.strip().split("\n")[0]


class Daemon:
    """A process in the background, with its output in a file."""

    def __init__(self, command: Sequence[str | Path], log: Path, environment: dict[str, str] | None = None) -> None:
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **(environment or {})},
            )
        self._log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        """Return when it is so; raise :exc:`RuntimeError` if it ends, or takes too long."""
        deadline = time.monotonic() + WAIT_S
        while not ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{what}: {self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.01)

    def end(self) -> None:
        """Ask it to end, wait for that, and kill it if it does not."""
        self._process.terminate()
        self.wait()

    def kill(self) -> None:
        """End it as a crash does."""
        self._process.kill()
        self._process.wait()

    def wait(self) -> None:
        """Wait for its end, and kill it if that does not come."""
        try:
            self._process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def is_mounted(point: Path) -> bool:
    """Say whether something is mounted there."""
    return mounts.find_mount(str(point)) is not None
