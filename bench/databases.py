"""Servers of storage engines on loopback, each in a directory of its own: for measurements, and for the tests."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import psutil

from bench.ports import free_ports, listens

_START_S: Final = 60.0
_numbers = itertools.count()


def next_number() -> int:
    """Return a number that no engine of this process has in its URL."""
    return next(_numbers)


class Unavailable(Exception):
    """A server cannot be had here."""


class Server:
    """A process of a server, in a directory of its own, on one or more ports."""

    name = ""

    def __init__(self, ports: Sequence[int] = ()) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"bpfuse-{self.name}-"))
        self.port, *self._other_ports = ports or free_ports(2)
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """Return the command that runs it in the foreground."""
        raise NotImplementedError

    def url(self, port: int | None = None) -> str:
        """Return the URL of an engine that nobody has used; on another port, where a proxy listens."""
        raise NotImplementedError

    @property
    def ports(self) -> list[int]:
        """Where clients are let in."""
        return [self.port]

    def ready(self) -> bool:
        return listens(self.port)

    def start(self) -> None:
        """Start it, on what an earlier start left, and return when it is ready."""
        self.spawn()
        self.wait_until_ready()

    def spawn(self) -> None:
        """Start it."""
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def wait_until_ready(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + _START_S
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not start: {(self.directory / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def kill(self) -> None:
        """End it at once."""
        self._end(signal.SIGKILL)

    def hang(self) -> None:
        """Have it stand still, with its children: it accepts connections, and answers nothing."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Have it go on after :meth:`hang`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        parent = psutil.Process(self.process.pid)
        for each in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """End it and remove what it has stored."""
        self._end(signal.SIGKILL)
        shutil.rmtree(self.directory)


def _program(name: str, *places: str) -> str:
    for place in places:
        if (Path(place) / name).exists():
            return str(Path(place) / name)
    found = shutil.which(name)
    if found is None:
        raise Unavailable(f"there is no {name}")
    return found


def as_user(name: str) -> list[str]:
    """Return what begins a command that is to run as a user other than root, for servers that refuse to be root's."""
    if os.getuid() != 0:
        return []
    return [_program("setpriv"), f"--reuid={name}", f"--regid={name}", "--clear-groups"]


class Etcd(Server):
    """A cluster of one member."""

    name = "etcd"
    scheme = "http"

    def __init__(self, ports: Sequence[int] = ()) -> None:
        self.program = _program("etcd")
        super().__init__(ports)
        self.peer = f"http://127.0.0.1:{self._other_ports[0]}"
        #: What members reach each other at.
        self.peers = [self.peer]

    def command(self) -> list[str]:
        client = f"{self.scheme}://127.0.0.1:{self.port}"
        members = ",".join(f"test{number}={peer}" for number, peer in enumerate(self.peers))
        return [
            self.program, f"--name=test{self.peers.index(self.peer)}", f"--data-dir={self.directory}/data",
            f"--listen-client-urls={client}", f"--advertise-client-urls={client}", f"--listen-peer-urls={self.peer}",
            f"--initial-advertise-peer-urls={self.peer}", f"--initial-cluster={members}", "--log-level=warn",
            "--logger=zap",
        ]  # fmt: skip

    def url(self, port: int | None = None) -> str:
        return f"etcd://127.0.0.1:{port or self.port}/test/{next_number()}"


class Postgres(Server):
    """A cluster of its own, which its superuser needs no password for."""

    name = "postgresql"
    #: What initdb is told beside the rest.
    access: tuple[str, ...] = ("--auth=trust",)

    def __init__(self) -> None:
        places = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        self._program = _program("postgres", *map(str, reversed(places)))
        initdb = _program("initdb", *map(str, reversed(places)))
        self._prefix = as_user("postgres")
        #: Who it has to run as; empty: as this process.
        self.runs_as = "postgres" if self._prefix else ""
        super().__init__()
        if self.runs_as:
            shutil.chown(self.directory, self.runs_as, self.runs_as)
        (self.directory / "log").touch()
        self.prepare()
        made = [*self._prefix, initdb, *self.access, "--username=postgres", "--no-sync", "--encoding=UTF8"]
        subprocess.run([*made, f"{self.directory}/data"], check=True, capture_output=True, cwd="/")

    def prepare(self) -> None:
        """See to what initdb needs."""

    def command(self) -> list[str]:
        return [
            *self._prefix, self._program, "-D", f"{self.directory}/data", "-p", str(self.port),
            "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self.directory}",
            "-c", "shared_buffers=32MB", "-c", "max_connections=60",
        ]  # fmt: skip

    def ready(self) -> bool:
        return "ready to accept connections" in (self.directory / "log").read_text().rpartition("starting")[2]

    def kill(self) -> None:
        """End it and its children at once."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        super().kill()
        for each in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(children, timeout=_START_S)

    def close(self) -> None:
        self._end(signal.SIGQUIT)
        shutil.rmtree(self.directory)

    def url(self, port: int | None = None) -> str:
        schema = f"test{next_number()}"
        return f"postgresql://postgres@127.0.0.1:{port or self.port}/postgres?schema={schema}"


class Mariadb(Server):
    """A server without accounts: whoever reaches it may do anything, and it needs no setting up."""

    name = "mariadb"
    #: What the server is told of accounts, and the statements that make them.
    access: tuple[str, ...] = ("--skip-grant-tables",)
    accounts = b""

    def __init__(self) -> None:
        self._program = _program("mariadbd", "/usr/sbin")
        super().__init__()
        (self.directory / "data" / "test").mkdir(parents=True)
        (self.directory / "data" / "test" / "db.opt").write_text("default-character-set=utf8mb4\n")
        self.prepare()
        self._common = [
            self._program, "--no-defaults", f"--datadir={self.directory}/data", "--innodb-buffer-pool-size=32M",
            "--innodb-log-file-size=32M", *(["--user=root"] * (os.getuid() == 0)),
        ]  # fmt: skip
        # A server that is killed before its first shutdown does not start again.
        made = [*self._common, "--bootstrap"]
        subprocess.run(made, check=True, capture_output=True, input=self.accounts, timeout=_START_S)

    def prepare(self) -> None:
        """See to what the server is set up with."""

    def command(self) -> list[str]:
        return [
            *self._common, f"--socket={self.directory}/socket", "--bind-address=127.0.0.1", f"--port={self.port}",
            *self.access, "--skip-name-resolve",
        ]  # fmt: skip

    def url(self, port: int | None = None) -> str:
        return f"mysql://root@127.0.0.1:{port or self.port}/test?tables=test{next_number()}"


SERVERS: Final[dict[str, type[Server]]] = {"etcd": Etcd, "postgresql": Postgres, "mysql": Mariadb}
