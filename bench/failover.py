"""How long a failover takes: the authority of two metaservers is killed, 20 times, under a writer, on each engine; and
so is the leader of three members of etcd, and the database.

A sample is the longest that a program waited for one change (a file made, written and closed) around a kill, so it has
all that there is in between: the takeover, the clients' way to it, and their coming back.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Final, cast

from bench.databases import SERVERS, Server, Unavailable
from bench.etcd_cluster import EtcdCluster
from bench.ports import free_ports
from bench.results import Figure, Result, Samples
from bench.systems import bpfuse, mounted
from fuseclient.observe import status

_KILLS: Final = 20
_DATABASES: Final = ("postgresql", "mysql")
_LEASE_S: Final = 30.0
#: What a pause may be beyond a lease, in seconds.
_BEYOND_S: Final = 5.0
#: Changes that are made at the next authority before the next kill.
_CHANGES: Final = 20
#: Seconds that anything here may take.
_LONGEST_S: Final = 90.0


def run(directory: Path, rounds: int, *, small: bool) -> Result:
    """Kill as often as it takes, whatever ``rounds`` says; all files lie in ``directory``."""
    kills = 2 if small else _KILLS
    samples, setting = Samples(), {"kills": kills, "lease_s": int(_LEASE_S)}
    for kind in ["lmdb"] if small else ["lmdb", "etcd", *_DATABASES]:
        try:
            told = _measure(kind, directory / kind, kills, samples)
        except Unavailable:
            continue
        setting[f"closes that told of a loss, {kind}"] = told
    figures = [figure for each, pauses in samples.seconds.items() for figure in _figures(*each, pauses)]
    return Result("failover", kills, setting, samples, figures)


def _measure(kind: str, directory: Path, kills: int, samples: Samples) -> int:
    """Kill on one engine; return how many closes told that a file, which was put off, is lost."""
    with contextlib.ExitStack() as stack:
        database: Server | EtcdCluster | None = None
        engine = f"lmdb://{directory}/engine"
        if kind != "lmdb":
            database = EtcdCluster() if kind == "etcd" else SERVERS[kind]()
            stack.callback(database.close)
            database.start()
            engine = database.url()
        (directory / "mnt").mkdir(parents=True)
        servers = stack.enter_context(_metaservers(directory, engine))
        url = f"bpfuse://{','.join(servers)}/failover"
        bpfuse("format", url, "--store", f"file://{directory}/blocks")
        point = stack.enter_context(mounted(url, directory / "mnt"))
        writer = stack.enter_context(_writing(point))
        for _ in range(kills):
            samples.add("authority", f"bpfuse {kind}", _pause(url, servers, writer))
        if database is not None:
            what = "leader" if isinstance(database, EtcdCluster) else "database"
            for _ in range(kills):
                samples.add(what, f"bpfuse {kind}", _pause_of(database, url, servers, writer))
        return writer.told()


def _figures(what: str, system: str, pauses: list[float]) -> list[Figure]:
    """Return the distribution; the longest pause has a limit."""
    ordered = sorted(pauses)
    parts = {"least": ordered[0], "median": statistics.median(ordered), "90 %": ordered[(len(ordered) * 9 - 1) // 10]}
    figures = [Figure(what, f"{system}, {name}", "", value, "s") for name, value in parts.items()]
    return [*figures, Figure(what, f"{system}, longest", "", ordered[-1], "s", _LEASE_S + _BEYOND_S)]


class _Metaserver:
    """One of them, as a process that can be started again."""

    def __init__(self, place: str, directory: Path, engine: str) -> None:
        self._command = [sys.executable, "-P", "-m", "metaserver", "--engine", engine]
        self._command += ["--listen", f"tcp:{place}", "--lease-s", str(_LEASE_S)]
        self._log = directory / "metaserver.log"
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stderr=log)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(_LONGEST_S)


@contextlib.contextmanager
def _metaservers(directory: Path, engine: str) -> Iterator[dict[str, _Metaserver]]:
    """Give two metaservers on one engine, by host and port."""
    places = [f"127.0.0.1:{port}" for port in free_ports(2)]
    servers = {place: _Metaserver(place, directory, engine) for place in places}
    try:
        yield servers
    finally:
        for each in servers.values():
            each.end()


def _pause(url: str, servers: dict[str, _Metaserver], writer: _Writer) -> float:
    """Kill the authority; return the longest change until some were made at the next one."""
    _wait(lambda: _online(url) == len(servers))
    serving = str(status.read(url)["authority"]).removeprefix("tcp:")
    writer.make(_CHANGES)
    writer.take_longest()
    servers[serving].kill()
    writer.make(_CHANGES)
    servers[serving].start()
    return writer.take_longest()


def _pause_of(database: Server | EtcdCluster, url: str, servers: dict[str, _Metaserver], writer: _Writer) -> float:
    """Kill a database, or the leader of a cluster, and start it again; return the longest change meanwhile."""
    _wait(lambda: _online(url) == len(servers))
    victim = database
    if isinstance(database, EtcdCluster):
        _wait(lambda: database.leader() is not None)
        victim = database.leader() or database.members[0]
    writer.make(_CHANGES)
    writer.take_longest()
    victim.kill()
    if victim is not database:  # the others go on without it
        writer.make(_CHANGES)
    victim.start()
    writer.make(_CHANGES)
    return writer.take_longest()


def _online(url: str) -> int:
    return sum(each["state"] == "online" for each in status.read(url)["metaservers"])


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _LONGEST_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("the failover does not end")
        time.sleep(0.02)


class _Writer:
    """Makes files, one after the other.

    In a process of its own: who starts a server while it has files of a mount open waits until those are flushed, as
    the child closes them first.
    """

    def __init__(self, point: Path) -> None:
        self._point = point
        self._made = 0
        self._longest_s = 0.0
        self._ended = threading.Event()
        #: Changes that failed: LMDB had put a new file off for a moment, and its close said that it was lost.
        self._told = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Return when it makes no more."""
        self._ended.set()
        self._thread.join(_LONGEST_S)

    def told(self) -> int:
        """Return how many changes failed so."""
        return self._told

    def _run(self) -> None:
        while not self._ended.is_set():
            began = time.monotonic()
            try:
                (self._point / f"file{self._made % 1000}").write_bytes(b"content")
            except OSError:
                self._told += 1
            self._longest_s = max(self._longest_s, time.monotonic() - began)
            self._made += 1

    def make(self, count: int) -> None:
        """Return when so many more changes were made."""
        until = self._made + count
        _wait(lambda: self._made >= until)

    def take_longest(self) -> float:
        """Return the seconds that the longest change took, and forget it."""
        longest_s, self._longest_s = self._longest_s, 0.0
        return longest_s


class _Process(BaseManager):
    """The process of a writer."""


_Process.register("Writer", _Writer)


@contextlib.contextmanager
def _writing(point: Path) -> Iterator[_Writer]:
    with _Process(ctx=multiprocessing.get_context("spawn")) as process:
        writer = cast(_Writer, process.Writer(point))  # type: ignore[attr-defined]
        try:
            yield writer
        finally:
            writer.end()
