"""Small files with the metadata in each engine, beside JuiceFS on the same servers, and on Redis.

A break is a change of a file that another mount has just looked at, and will look at again, until that shows it; only
without caches does JuiceFS show it then.

Every mount is of this machine, and so are the servers: the round trips that a network would make dear are nearly free
here. What a create and a lookup ask of the engine is counted by the tests. Nothing is measured where a server's
packages are not installed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench import measure
from bench.databases import SERVERS, Server, Unavailable
from bench.peers.base import Daemon, Peer, fresh
from bench.peers.juicefs import Juicefs, JuicefsRedis
from bench.peers.own import Bpfuse
from bench.ports import free_ports, listens
from bench.results import Figure, Result, Samples
from bench.systems import bpfuse
from fuseclient.bench import works

#: The forms in which JuiceFS wants its URLs.
_JUICEFS_URLS: Final = {
    "etcd": "etcd://127.0.0.1:{port}/{name}",
    "postgresql": "postgres://postgres@127.0.0.1:{port}/postgres?sslmode=disable&search_path=public",
    "mysql": "mysql://root@(127.0.0.1:{port})/test",
}


def run(directory: Path, rounds: int, *, small: bool) -> Result:
    """Measure; all files of the mounts lie in ``directory``."""
    files = 20 if small else 500
    samples, kinds = Samples(), ["etcd"] if small else list(SERVERS)
    for _ in range(rounds):
        _measure(_own("lmdb", lambda directory: f"lmdb://{directory}/engine"), "bpfuse lmdb", directory, files, samples)
        for kind in kinds:
            try:
                server = SERVERS[kind]()
            except Unavailable:
                continue
            try:
                server.start()
                _measure(_own(kind, _always(server.url())), f"bpfuse {kind}", directory, files, samples)
                if not small and Juicefs.missing() is None:
                    _measure(_juicefs(server, kind), f"juicefs {kind}", directory, files, samples)
            finally:
                server.close()
        if not small and JuicefsRedis.missing() is None:
            _measure(JuicefsRedis, "juicefs redis", directory, files, samples)
    figures: list[Figure] = []
    for workload in ("create", "lookup", "directory", "break"):
        for kind in kinds:
            figures += samples.ratio(workload, f"bpfuse {kind}", f"juicefs {kind}", 1.0)
        for kind in ("lmdb", *kinds):
            figures += samples.ratio(workload, f"bpfuse {kind}", "juicefs redis", None)
    return Result("engines", rounds, {"files": files}, samples, figures)


def _measure(kind: type[Bpfuse | Juicefs], name: str, directory: Path, files: int, samples: Samples) -> None:
    """Make files; look each up, and list all with their attributes, on mounts that know nothing; change them."""
    with fresh(kind, directory) as peer:
        made = peer.root / "made"
        made.mkdir()
        (seconds,) = measure.run("create", directory=str(made), files=files)
        samples.add("create", name, seconds, files)
        measure.check_created(str(made), files)
        names = sorted(os.listdir(made))
        peer.restart()
        start = time.perf_counter()
        for each in names:
            os.stat(made / each)
        samples.add("lookup", name, time.perf_counter() - start, files)
        peer.restart()
        start = time.perf_counter()
        with os.scandir(made) as entries:
            found = sorted(entry.name for entry in entries if entry.stat().st_size)
        samples.add("directory", name, time.perf_counter() - start, files)
        if found != names:
            raise works.Wrong(f"{name}: the listing is another after a remount")
        with peer.beside() as other:
            samples.add("break", name, _break(made, other / made.name, names), files)


def _break(here: Path, there: Path, names: list[str]) -> float:
    """Change files through one mount that another has looked at; return the seconds until it has shown all changes."""
    for each in names:
        os.stat(there / each)
    start = time.perf_counter()
    for each in names:
        os.chmod(here / each, 0o600)
        while os.stat(there / each).st_mode & 0o777 != 0o600:
            pass
    return time.perf_counter() - start


def _always(url: str) -> Callable[[Path], str]:
    return lambda directory: url


def _own(kind: str, engine: Callable[[Path], str]) -> type[Bpfuse]:
    """``engine`` is the URL of an engine for a volume in a directory."""

    class OnEngine(Bpfuse):
        """A volume of a metaserver on this engine."""

        name = f"bpfuse {kind}"

        def __init__(self, directory: Path) -> None:
            Peer.__init__(self, directory)
            self._mounted = False
            self._formatted = False
            (self._port,) = free_ports(1)
            self._url = f"bpfuse://127.0.0.1:{self._port}/bench"
            self._server: Daemon | None = None

        def start(self, *, ttl_s: float | None = None, writing: bool = False) -> None:
            command = [sys.executable, "-P", "-m", "fuseclient.cli", "metaserver", "--engine", engine(self.directory)]
            log = self.directory / "metaserver.log"
            self._server = Daemon([*command, "--listen", f"127.0.0.1:{self._port}"], log)
            self._server.wait_until(lambda: listens(self._port), "the metaserver does not listen")
            if not self._formatted:
                bpfuse("format", self._url, "--store", f"file://{self.directory}/blocks")
                self._formatted = True
            super().start(ttl_s=ttl_s, writing=writing)

        def stop(self) -> None:
            super().stop()
            if self._server is not None:
                self._server.end()
                self._server = None

    return OnEngine


def _juicefs(server: Server, kind: str) -> type[Juicefs]:
    class OnEngine(Juicefs):
        """JuiceFS with its metadata on this engine."""

        name = f"juicefs {kind}"
        engine = kind

        def meta_url(self) -> str:
            return _JUICEFS_URLS[kind].format(port=server.port, name=self.directory.name)

    return OnEngine
