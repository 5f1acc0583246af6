"""Storage engines, chosen by URL."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from metaserver.engine.authority import Candidate
from metaserver.engine.base import Engine, Snapshot, Space, Transaction
from metaserver.engine.location import FORMS, Location, parse
from metaserver.errors import EngineUnusable

if TYPE_CHECKING:
    from metaserver.engine.etcd import EtcdStore
    from metaserver.engine.lmdb import LmdbEngine
    from metaserver.engine.mysql import MysqlStore
    from metaserver.engine.postgres import PostgresStore
    from metaserver.engine.remote_authority import Lock
    from metaserver.engine.store import Store

__all__ = [
    "DURABILITIES",
    "FORMS",
    "Candidate",
    "Engine",
    "Snapshot",
    "Space",
    "Transaction",
    "candidate",
    "check_url",
    "open_engine",
]


_PAGE: Final = 4096
_LEAST_MAP: Final = 256 * 1024
_MOST_MAP: Final = 2**46
#: A schema's name, and what those of tables begin with: it goes into statements as it is.
_SCHEMA: Final = re.compile(r"[a-z_][a-z0-9_]{0,40}")
#: When commits are durable: before they are acknowledged, or soon after (see lmdb.py).
DURABILITIES: Final = ("commit", "interval")


def check_url(url: str) -> None:
    """Raise EngineUnusable for what cannot be an engine's URL, or has a password in it."""
    _parsed(url)


def open_engine(url: str, durability: str = "commit") -> Engine:
    """Open an engine, a directory of LMDB's is made if missing; raise EngineUnusable or EngineBusy.

    ``durability`` "interval" concerns LMDB; the others have every commit durable before it is acknowledged. Servers
    are connected to at the first request, which raises EngineUnusable if they do not answer.
    """
    kind, location = _parsed(url)
    return kind.open(location, durability)


def candidate(url: str, address: str, durability: str = "commit") -> Candidate:
    """Return a standing for the authority over an engine, of a metaserver at ``address``; raise EngineUnusable.

    It opens the engine, as :func:`open_engine` does, once it has the authority.
    """
    kind, location = _parsed(url)
    return kind.stand(location, address, durability)


class _Kind(NamedTuple):
    open: Callable[[Location, str], Engine]
    stand: Callable[[Location, str, str], Candidate]


def _parsed(url: str) -> tuple[_Kind, Location]:
    location = parse(url)
    if location.scheme not in _KINDS:
        raise EngineUnusable(f"{url}: no such storage engine; known are {FORMS}")
    return _KINDS[location.scheme], location


# Memory


def _memory(location: Location, durability: str) -> Engine:
    from metaserver.engine.memory import MemoryEngine

    return MemoryEngine()


def _stand_for_memory(location: Location, address: str, durability: str) -> Candidate:
    from metaserver.engine.memory import MemoryCandidate, Store

    return MemoryCandidate(address, Store())


# LMDB


def _lmdb(location: Location, durability: str) -> LmdbEngine:
    from metaserver.engine.lmdb import LmdbEngine

    directory, map_bytes = _lmdb_place(location)
    return LmdbEngine(directory, lazy=durability == "interval", map_bytes=map_bytes or None)


def _stand_for_lmdb(location: Location, address: str, durability: str) -> Candidate:
    from metaserver.engine.lmdb_authority import LmdbCandidate

    return LmdbCandidate(address, _lmdb_place(location)[0], lambda: _lmdb(location, durability))


def _lmdb_place(location: Location) -> tuple[str, int]:
    """Return the directory and the size of the map, in bytes; 0: the default one."""
    if location.hosts or location.user or not location.path.startswith("/"):
        raise EngineUnusable(f"{location.url}: write lmdb:///absolute/directory")
    location.allow("map_size")
    return location.path, location.number("map_size", 0, _LEAST_MAP, _MOST_MAP) // _PAGE * _PAGE


# Servers elsewhere


def _remote(store: Callable[[Location], Store], lock: Callable[[Location], Lock]) -> _Kind:
    """Return the kind of an engine on a store; the lock has a store of its own."""

    def opened(location: Location, durability: str) -> Engine:
        from metaserver.engine.remote import RemoteEngine

        return RemoteEngine(store(location), location.url)

    def stand(location: Location, address: str, durability: str) -> Candidate:
        from metaserver.engine.remote import RemoteEngine
        from metaserver.engine.remote_authority import RemoteCandidate

        return RemoteCandidate(address, lock(location), lambda: RemoteEngine(store(location), location.url))

    return _Kind(opened, stand)


def _etcd_lock(location: Location) -> Lock:
    from metaserver.engine.etcd_lock import EtcdLock

    return EtcdLock(_etcd_store(location))


def _etcd_store(location: Location) -> EtcdStore:
    from metaserver.engine import etcd

    location.allow("password_file", "ca", "cert", "key", "quota")
    prefix = location.path.strip("/")
    if not location.hosts or not prefix or len(prefix.encode()) > etcd.MOST_PREFIX or "\0" in prefix:
        raise EngineUnusable(f"{location.url}: write etcd://host:port,host:port/prefix")
    settings = etcd.Settings(
        endpoints=tuple(f"{host}:{port or etcd.PORT}" for host, port in location.hosts),
        prefix=prefix.encode(),
        user=location.user,
        password=location.password() if location.user else None,
        key=location.private_key(),
        ca=location.file("ca"),
        certificate=location.file("cert"),
        quota=location.number("quota", etcd.QUOTA, 1 << 20, 1 << 40),
    )
    return etcd.EtcdStore(settings)


def _postgres_lock(location: Location) -> Lock:
    from metaserver.engine.postgres_lock import PostgresLock

    return PostgresLock(_postgres_store(location))


def _postgres_store(location: Location) -> PostgresStore:
    from metaserver.engine import postgres

    location.allow("password_file", "ca", "cert", "key", "schema", "capacity")
    database, schema = location.path.strip("/"), location.options.get("schema", "bpfuse")
    if not location.hosts or not location.user or not database or not _SCHEMA.fullmatch(schema):
        raise EngineUnusable(f"{location.url}: write postgresql://user@host:port/database?schema=name")
    settings = postgres.Settings(
        hosts=location.hosts,
        database=database,
        user=location.user,
        schema=schema,
        password=location.password(),
        tls=location.tls(),
        capacity=location.number("capacity", postgres.CAPACITY, 1 << 20, 1 << 60),
    )
    return postgres.PostgresStore(settings)


def _mysql_lock(location: Location) -> Lock:
    from metaserver.engine.mysql_lock import MysqlLock

    return MysqlLock(_mysql_store(location))


def _mysql_store(location: Location) -> MysqlStore:
    from metaserver.engine import mysql

    location.allow("password_file", "ca", "cert", "key", "tables", "capacity")
    database, tables = location.path.strip("/"), location.options.get("tables", "bpfuse")
    if len(location.hosts) != 1 or not location.user or not database or not _SCHEMA.fullmatch(tables):
        raise EngineUnusable(f"{location.url}: write mysql://user@host:port/database?tables=name")
    settings = mysql.Settings(
        host=location.hosts[0][0],
        port=location.hosts[0][1],
        database=database,
        user=location.user,
        tables=tables,
        password=location.password() or "",
        tls=location.tls(),
        capacity=location.number("capacity", mysql.CAPACITY, 1 << 20, 1 << 60),
    )
    return mysql.MysqlStore(settings)


_KINDS: Final = {
    "memory": _Kind(_memory, _stand_for_memory),
    "lmdb": _Kind(_lmdb, _stand_for_lmdb),
    "etcd": _remote(_etcd_store, _etcd_lock),
    "postgresql": _remote(_postgres_store, _postgres_lock),
    "mysql": _remote(_mysql_store, _mysql_lock),
}
