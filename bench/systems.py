"""What is measured: bpfuse in its modes, and the yardstick, a proof of the datapath that does nothing but answer.

A system is prepared once; each use of :meth:`System.mounted` is a fresh mount, its processes new and its caches cold.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench import measure
from fuseclient import control, mounts, runtime
from fuseclient.channel import acceleration

_MOUNT_S: Final = 30.0
#: The sources of the proof of the datapath.
_PROOF: Final = Path(__file__).parent.parent.parent / "shared" / "feasibility"


@dataclass(frozen=True)
class Tree:
    """``files`` files of ``size`` bytes, evenly in ``directories`` directories; file n holds the byte n + 2 only."""

    files: int
    directories: int
    size: int

    def paths(self, root: Path) -> list[str]:
        """Return every file's path, directory after directory."""
        each = self.files // self.directories
        return [f"{root}/d{number // each}/f{number}" for number in range(self.files)]

    def create(self, root: Path) -> None:
        """Write the tree below ``root``."""
        for number in range(self.directories):
            (root / f"d{number}").mkdir()
        for number, path in enumerate(self.paths(root)):
            Path(path).write_bytes(bytes([(number + 2) & 255]) * self.size)


def bpfuse(*arguments: str | Path) -> None:
    """Run the command ``bpfuse``."""
    command = [sys.executable, "-P", "-m", "fuseclient.cli", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def mounted(url: str, point: Path, *options: str | Path) -> Iterator[Path]:
    """Mount a volume on a directory, which is made if missing, for the body."""
    point.mkdir(exist_ok=True)
    bpfuse("mount", url, point, *options)
    try:
        yield point
    finally:
        bpfuse("umount", point)


def stats(mountpoint: Path) -> dict[str, Any]:
    """Return what a mount tells of itself."""
    answer: dict[str, Any] = control.ask(
        runtime.directory_of(str(mountpoint)).control_socket, "stats", timeout_s=_MOUNT_S
    )
    return answer


def prefer_server(point: Path) -> None:
    """Let what answers the requests of a mount in the kernel go before all other processes: see measure.prefer."""
    for record in runtime.live_records():
        if record.mountpoint == str(point):
            measure.prefer(record.pid)


class System(ABC):
    """Something that can be mounted and holds a tree of files."""

    name: str

    @abstractmethod
    def prepare(self, tree: Tree) -> None:
        """Make what every mount of this system shares."""

    @abstractmethod
    def mounted(self, *, kernel_ttl_s: float | None) -> contextlib.AbstractContextManager[list[str]]:
        """Mount afresh for the body, and give the paths of the files. ``None``: as long a time-to-live as it can."""


class Bpfuse(System):
    """The real thing, by its own command."""

    _tree: Tree
    #: Whose tree it is, if not this one's.
    _base: Bpfuse | None = None

    def __init__(self, directory: Path, accel: str, options: tuple[str, ...] = ()) -> None:
        self.name = f"bpfuse {accel}"
        self._accel = accel
        self._options = options
        self._url = f"file://{directory / 'volume'}"
        self._mountpoint = directory / "mnt"

    def beside(self, name: str, *options: str) -> Bpfuse:
        """Return the same volume mounted with other options; it is to be prepared through this one, before."""
        other = copy.copy(self)
        other.name, other._options, other._base = name, options, self
        return other

    def prepare(self, tree: Tree) -> None:
        self._tree = tree
        self._mountpoint.mkdir(parents=True)
        bpfuse("format", self._url)
        with self.mounted(kernel_ttl_s=None):
            tree.create(self._mountpoint)

    @contextlib.contextmanager
    def mounted(self, *, kernel_ttl_s: float | None) -> Iterator[list[str]]:
        options = [] if kernel_ttl_s is None else ["--kernel-ttl", str(kernel_ttl_s)]
        bpfuse("mount", self._url, self._mountpoint, "--accel", self._accel, *self._options, *options)
        try:
            yield (self._base or self)._tree.paths(self._mountpoint)
        finally:
            bpfuse("umount", self._mountpoint)


class Proof(System):
    """The yardstick: C and BPF that serve files of one directory, from maps that are filled before the mount; 2,000 of
    them, unless it is built for another number."""

    name = "proof"
    FILES: Final = 2000
    #: Whether its mounts go before all other processes: see measure.prefer.
    preferred = False

    def __init__(self, sources: Path, directory: Path) -> None:
        self._sources = sources
        self._directory = directory / "proof"
        self._mountpoint = directory / "proof-mnt"

    def prepare(self, tree: Tree) -> None:
        self._tree = tree
        self._mountpoint.mkdir(parents=True)
        shutil.copytree(self._sources, self._directory)
        source = self._directory / "channel.c"
        source.write_text(source.read_text().replace(f"FILES = {self.FILES}", f"FILES = {tree.files}"))
        subprocess.run(["make", "-s", "-C", self._directory], check=True, stdout=sys.stderr)

    @contextlib.contextmanager
    def mounted(self, *, kernel_ttl_s: float | None) -> Iterator[list[str]]:
        ttl_s = 3600 if kernel_ttl_s is None else int(kernel_ttl_s)
        environment = {**os.environ, "BPF": "1", "TTL": str(ttl_s), "SIZE": str(self._tree.size)}
        with acceleration.uring_enabled():
            server = subprocess.Popen(
                ["./channel", self._mountpoint], cwd=self._directory, env=environment, stdout=subprocess.DEVNULL
            )
            self._wait_mounted(server)
            if self.preferred:
                measure.prefer(server.pid)
        try:
            yield [f"{self._mountpoint}/f{number}" for number in range(self._tree.files)]
        finally:
            mounts.unmount(str(self._mountpoint))
            server.wait(_MOUNT_S)

    def _wait_mounted(self, server: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _MOUNT_S
        while mounts.find_mount(str(self._mountpoint)) is None:
            if server.poll() is not None or time.monotonic() > deadline:
                server.send_signal(signal.SIGKILL)
                raise RuntimeError("the proof did not mount")
            time.sleep(0.01)
        os.stat(f"{self._mountpoint}/f0")


def proof(directory: Path) -> list[Proof]:
    """Return the proof of the datapath if its sources are here."""
    sources = Path(os.environ.get("BPFUSE_PROOF", _PROOF))
    if sources.is_dir():
        return [Proof(sources, directory)]
    print(f"left out: the proof of the datapath, which is not at {sources} (BPFUSE_PROOF says where)", file=sys.stderr)
    return []
