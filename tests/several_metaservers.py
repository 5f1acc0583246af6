"""Several metaservers of one engine, as processes: which of them serves, and how each of them ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

import rig
from several_mounts import VOLUME, Server

from fuseclient.observe import status as observed


class Group:
    """Metaservers on one engine, each on a port of its own; ``engines`` is the engine's URL for each of them."""

    def __init__(self, sandbox: rig.Sandbox, engines: Sequence[str], lease_s: float) -> None:
        self.servers = [Server(sandbox, lease_s, engine=engine) for engine in engines]

    @property
    def url(self) -> str:
        """The volume's URL, which names them all."""
        return f"bpfuse://{','.join(f'127.0.0.1:{each.port}' for each in self.servers)}/{VOLUME}"

    def start(self) -> None:
        for each in self.servers:
            each.start()

    def close(self) -> None:
        """End them, the hung ones too."""
        for each in self.servers:
            each.close()

    def status(self) -> dict[str, Any]:
        """Return what ``bpfuse status --json`` shows."""
        return observed.read(self.url)

    def authority(self) -> Server:
        """Wait until one of them serves, and return it."""
        rig.wait_for(lambda: self.status()["authority"] is not None, "a metaserver serves")
        address = self.status()["authority"]
        return next(each for each in self.servers if each.address == address)

    def standby(self) -> Server:
        """Return one that does not serve."""
        serving = self.authority()
        return next(each for each in self.servers if each is not serving)

    def wait_for_another(self, server: Server) -> None:
        """Wait until another one than this serves."""
        rig.wait_for(lambda: self.status()["authority"] not in (None, server.address), "another one serves")

    def stands_by(self, server: Server) -> bool:
        """Say whether one answers, and not as the authority."""
        status = self.status()
        mine = (each["state"] for each in status["metaservers"] if each["address"] == server.address)
        return next(mine, None) == "online" and status["authority"] != server.address

    def hang(self, server: Server) -> None:
        """Have one stand still, as a process that hangs."""
        os.kill(server.pid, signal.SIGSTOP)

    def go_on(self, server: Server) -> None:
        """Have one that stood still go on."""
        os.kill(server.pid, signal.SIGCONT)

    def log(self) -> str:
        """What all of them have logged."""
        return self.servers[0].read_log()
