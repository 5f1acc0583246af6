"""An etcd cluster of three members on loopback, each of which can be killed and hung."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from typing import Any, Final

from bench.databases import Etcd, next_number
from bench.ports import free_ports

_MEMBERS: Final = 3
_ANSWER_S: Final = 1.0


class EtcdCluster:
    """The cluster, which commits as long as two of its members run."""

    name: Final = "etcd"

    def __init__(self) -> None:
        ports = free_ports(2 * _MEMBERS)
        self.members = [Etcd(ports[at : at + 2]) for at in range(0, len(ports), 2)]
        for each in self.members:
            each.peers = [other.peer for other in self.members]

    @property
    def ports(self) -> list[int]:
        """Where clients are let in."""
        return [each.port for each in self.members]

    def url(self) -> str:
        """Return the URL of an engine that nobody has used."""
        return f"etcd://{','.join(f'127.0.0.1:{port}' for port in self.ports)}/test/{next_number()}"

    def start(self) -> None:
        """Start those that do not run; return when all are ready."""
        started = [each for each in self.members if each.process is None]
        for each in started:  # none of them is ready before most run
            each.spawn()
        for each in started:
            each.wait_until_ready()

    def kill(self) -> None:
        """End all of them at once."""
        for each in self.members:
            each.kill()

    def hang(self) -> None:
        for each in self.members:
            each.hang()

    def go_on(self) -> None:
        for each in self.members:
            each.go_on()

    def leader(self) -> Etcd | None:
        """Return the member that most of those that answer say is the leader, if it answers."""
        answers = {each.port: status for each in self.members if (status := _status(each.port)) is not None}
        said = [status["leader"] for status in answers.values() if "leader" in status]
        for each in self.members:
            own = answers.get(each.port)
            if own is not None and 2 * said.count(own["header"]["member_id"]) > _MEMBERS:
                return each
        return None

    def close(self) -> None:
        """End it and remove what it has stored."""
        for each in self.members:
            each.close()


def _status(port: int) -> dict[str, Any] | None:
    """Return what a member says of itself, if it answers."""
    url = f"http://127.0.0.1:{port}/v3/maintenance/status"
    with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(url, b"{}", _ANSWER_S) as reply:
        status = json.load(reply)
        assert isinstance(status, dict)
        return status
    return None
