"""The local limits: ext4 itself, and what FUSE costs at best.

The latter is libfuse's own example passthrough_ll, a C server that hands every request to the file system below, as
Debian's libfuse3-dev ships it. It is compiled as its first lines say.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import psutil

from bench.peers.base import Daemon, Peer, is_mounted, output, run
from fuseclient import mounts

_EXAMPLE: Final = Path("/usr/share/doc/libfuse3-dev/examples/passthrough_ll.c")
_DEFAULT_TTL_S: Final = 1.0


class Ext4(Peer):
    """A directory of the file system that holds the benchmark's files."""

    name = "ext4"
    durability = "nothing at close, all at fsync"

    @classmethod
    def version(cls) -> str:
        return f"{_filesystem(tempfile.gettempdir())} of Linux {platform.release()}"

    def start(self, *, ttl_s: float | None = None, writing: bool = False) -> None:
        pass

    def stop(self) -> None:
        pass


class Passthrough(Peer):
    """libfuse's passthrough_ll over a directory of that file system, multi-threaded, with cloned descriptors."""

    name = "passthrough"
    durability = "nothing at close, all at fsync (as ext4, which is below)"
    #: It hands O_DIRECT down, with buffers that are not aligned as the file system below asks.
    direct_io = False

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._source = directory / "source"
        self._source.mkdir()
        self._daemon: Daemon | None = None

    @classmethod
    def missing(cls) -> str | None:
        if not _EXAMPLE.exists():
            return f"{_EXAMPLE} (apt install libfuse3-dev)"
        return None if shutil.which("gcc") and shutil.which("pkg-config") else "gcc and pkg-config"

    @classmethod
    def version(cls) -> str:
        return f"passthrough_ll of libfuse {output('pkg-config', '--modversion', 'fuse3')}"

    def start(self, *, ttl_s: float | None = None, writing: bool = False) -> None:
        timeout = _DEFAULT_TTL_S if ttl_s is None else ttl_s
        options = f"source={self._source},timeout={timeout},cache=auto,clone_fd,default_permissions"
        self._daemon = Daemon([_compiled(), "-f", "-o", options, self.root], self.directory / "log")
        self._daemon.wait_until(lambda: is_mounted(self.root), "passthrough_ll does not mount")

    def stop(self) -> None:
        if self._daemon is not None:
            mounts.unmount(str(self.root))
            self._daemon.wait()
            self._daemon = None

    def processes(self) -> dict[str, int]:
        return {} if self._daemon is None else {"daemon": self._daemon.pid}


def _compiled() -> Path:
    """Return the program, compiled once from these sources."""
    digest = hashlib.sha256(_EXAMPLE.read_bytes()).hexdigest()[:12]
    target = Path(tempfile.gettempdir()) / f"bpfuse-passthrough_ll-{digest}"
    if not target.exists():
        flags = subprocess.run(
            ["pkg-config", "fuse3", "--cflags", "--libs"], check=True, stdout=subprocess.PIPE, text=True
        ).stdout.split()
        run("gcc", "-O2", "-w", _EXAMPLE, "-o", target.with_suffix(".new"), *flags)
        target.with_suffix(".new").rename(target)
    return target


def _filesystem(path: str) -> str:
    """Return the type of the file system that holds ``path``."""
    parts = [each for each in psutil.disk_partitions(all=True) if Path(path).is_relative_to(each.mountpoint)]
    fstype: str = max(parts, key=lambda each: len(each.mountpoint)).fstype
    return fstype
