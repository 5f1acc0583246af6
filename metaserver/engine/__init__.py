"""Storage engines, chosen by URL."""

from __future__ import annotations

from typing import Final

from metaserver.engine.base import Engine, Snapshot, Space, Transaction
from metaserver.engine.location import FORMS, Location, parse
from metaserver.errors import EngineUnusable

__all__ = ["DURABILITIES", "FORMS", "Engine", "Snapshot", "Space", "Transaction", "check_url", "open_engine"]


_PAGE: Final = 4096
_LEAST_MAP: Final = 256 * 1024
_MOST_MAP: Final = 2**46
#: When commits are durable: before they are acknowledged, or soon after (see lmdb.py).
DURABILITIES: Final = ("commit", "interval")


def check_url(url: str) -> None:
    """Raise EngineUnusable for what cannot be an engine's URL, or has a password in it."""
    if parse(url).scheme not in _OPENERS:
        raise EngineUnusable(f"{url}: no such storage engine; known are {FORMS}")


def open_engine(url: str, durability: str = "commit") -> Engine:
    """Open an engine, a directory of LMDB's is made if missing; raise EngineUnusable or EngineBusy.

    ``durability`` "interval" concerns LMDB; the others have every commit durable before it is acknowledged. Servers
    are connected to at the first request, which raises EngineUnusable if they do not answer.
    """
    check_url(url)
    location = parse(url)
    return _OPENERS[location.scheme](location, durability)


def _memory(location: Location, durability: str) -> Engine:
    from metaserver.engine.memory import MemoryEngine

    return MemoryEngine()


def _lmdb(location: Location, durability: str) -> Engine:
    from metaserver.engine.lmdb import LmdbEngine

    if location.hosts or not location.path.startswith("/"):
        raise EngineUnusable(f"{location.url}: write lmdb:///absolute/directory")
    location.allow("map_size")
    map_bytes = location.number("map_size", 0, _LEAST_MAP, _MOST_MAP) // _PAGE * _PAGE
    return LmdbEngine(location.path, lazy=durability == "interval", map_bytes=map_bytes or None)


def _etcd(location: Location, durability: str) -> Engine:
    from metaserver.engine import etcd
    from metaserver.engine.remote import RemoteEngine

    location.allow("password_file", "ca", "cert", "key", "quota")
    prefix = location.path.strip("/")
    if not location.hosts or not prefix or len(prefix.encode()) > etcd.MOST_PREFIX or "\0" in prefix:
        raise EngineUnusable(f"{location.url}: write etcd://host:port,host:port/prefix")
    settings = etcd.Settings(
        endpoints=tuple(f"{host}:{port or etcd.PORT}" for host, port in location.hosts),
        prefix=prefix.encode(),
        user=location.user,
        password=location.password() if location.user else None,
        ca=location.file("ca"),
        certificate=location.file("cert"),
        key=location.file("key"),
        quota=location.number("quota", etcd.QUOTA, 1 << 20, 1 << 40),
    )
    return RemoteEngine(etcd.EtcdStore(settings), location.url)


_OPENERS: Final = {"memory": _memory, "lmdb": _lmdb, "etcd": _etcd}
