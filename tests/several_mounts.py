"""A metaserver as a process of its own and several real mounts of one volume of it, to be stopped, killed and cut off.

A stopped process is always continued, and a killed server started again, before the mounts are taken down.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import rig

from fuseclient import servers
from fuseclient.credentials import is_loopback

#: Seconds; short, so that what waits for a lease does not wait long.
LEASE_S: Final = 2.0
#: Seconds that a process may be late on a machine with much to do.
SLACK_S: Final = 5.0
VOLUME: Final = "home"
#: Log lines of mounts that killing, stopping and cutting off provoke.
WORKER_KILLED: Final = r"the worker \(pid \d+\) ended with -9"
#: The log of a server is to have no other serious line than these.
_SERIOUS: Final = re.compile(r"\b(ERROR|CRITICAL)\b|^Traceback", re.MULTILINE)


class Server:
    """A metaserver; it keeps its port when it is started again. ``prefix`` is what its command is run by."""

    def __init__(
        self,
        sandbox: rig.Sandbox,
        lease_s: float,
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
        engine: str | None = None,
    ) -> None:
        self.engine = engine or f"lmdb://{sandbox.path}/engine"
        self.lease_s = lease_s
        self.port = 0
        self._host = host
        self._sandbox = sandbox
        self._prefix = prefix
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self._sandbox.path / "metaserver.log"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def url(self) -> str:
        return f"bpfuse://{self._host}:{self.port}/{VOLUME}{self._query}"

    @property
    def address(self) -> str:
        return f"tcp:{self._host}:{self.port}{self._query}"

    @property
    def _query(self) -> str:
        return "" if is_loopback(self._host) else "?insecure"

    def start(self) -> None:
        """Start it, and return when it listens."""
        reading, writing = os.pipe()
        command = [*self._prefix, sys.executable, "-P", "-m", "metaserver", "serve", "--insecure", "--squash", "none"]
        command += ["--engine", self.engine, "--listen", f"tcp:{self._host}:{self.port}"]
        command += ["--lease-s", str(self.lease_s), "--ready-fd", str(writing)]
        with self.log.open("ab") as log, open(reading, "rb", buffering=0) as ready:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=log, pass_fds=(writing,), env=self._sandbox.environment
            )
            os.close(writing)
            line = servers.read_line(ready.fileno(), rig.WAIT_S) or b""
        said = re.fullmatch(rb"ready tcp:.*:(\d+)", line)
        assert said is not None, f"{line!r}\n{self.read_log()}"
        self.port = int(said[1])

    def kill(self) -> None:
        """End it by SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """Kill it and start it again."""
        self.kill()
        self.start()

    def close(self) -> None:
        """End it, in order if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(rig.WAIT_S)

    def read_log(self) -> str:
        return self.log.read_text(errors="replace")


class Cluster:
    """A metaserver, a volume, and its mounts. It ends with the ``stack``."""

    def __init__(self, sandbox: rig.Sandbox, server: Server, stack: contextlib.ExitStack) -> None:
        self.sandbox = sandbox
        self.server = server
        self.mounts: list[rig.Mount] = []
        self._stack = stack

    def mount(
        self, name: str, accel: str, *options: str, allowed: tuple[str, ...] = (), prefix: tuple[str, ...] = ()
    ) -> rig.Mount:
        """Mount the volume once more, under a watchdog."""
        path = self.sandbox.directory(name)
        made = rig.Mount(self.sandbox, self.server.url, path, accel, options, list(allowed), prefix)
        self.mounts.append(made)
        return self._stack.enter_context(rig.watched(made))

    def pair(self, accel: str, *options: str, allowed: tuple[str, ...] = ()) -> tuple[rig.Mount, rig.Mount]:
        """Mount twice."""
        return self.mount("a", accel, *options, allowed=allowed), self.mount("b", accel, *options, allowed=allowed)


@contextlib.contextmanager
def cluster(
    sandbox: rig.Sandbox,
    lease_s: float = LEASE_S,
    host: str = "127.0.0.1",
    prefix: Sequence[str] = (),
    engine: str | None = None,
    is_new: bool = True,
    allowed: str | None = None,
) -> Iterator[Cluster]:
    """A server with a volume, for the body, empty if it ``is_new``; ``engine`` is its URL, unless it is LMDB's.

    ``allowed`` is a pattern of serious lines that may be in its log.
    """
    rig.require_mounts()
    server = Server(sandbox, lease_s, host, prefix, engine)
    with contextlib.ExitStack() as stack:
        stack.callback(server.close)
        server.start()
        if is_new:
            made = sandbox.run("format", server.url, "--store", f"file://{sandbox.path}/blocks", prefix=prefix)
            made.expect_success()
        try:
            yield (running := Cluster(sandbox, server, stack))
        except BaseException:
            for each in running.mounts:
                print(f"--- log of {each.path}\n{each.read_log()}", file=sys.stderr)
            print(f"--- log of the metaserver\n{server.read_log()}", file=sys.stderr)
            raise
    serious = [line for line in server.read_log().splitlines() if _SERIOUS.search(line)]
    serious = [line for line in serious if allowed is None or not re.search(allowed, line)]
    assert not serious, server.read_log()


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Have a process stand still for the body."""
    os.kill(pid, signal.SIGSTOP)
    try:
        rig.wait_for(lambda: _state(pid) in "TX", f"process {pid} stands still")
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _state(pid: int) -> str:
    """Return the letter of a process's state; X if it is no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def _is_gone(pid: int) -> bool:
    """Say whether a process ended with all its threads: while one is left, its files and sockets are open."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except FileNotFoundError:
        return True
    return _state(pid) in "XZ" and len(threads) <= 1


def kill(mounted: rig.Mount, *roles: str) -> None:
    """Kill processes of a mount, all at once, and return when they are gone."""
    pids = [mounted.process(role).pid for role in roles]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)
    rig.wait_for(lambda: all(_is_gone(pid) for pid in pids), "the processes are gone")


def timed(call: Callable[[], object]) -> float:
    """Make a call; return how many seconds it took."""
    began = time.monotonic()
    call()
    return time.monotonic() - began
