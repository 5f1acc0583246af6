"""Storage engines, chosen by URL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import SplitResult, unquote, urlsplit

from metaserver.engine.authority import Candidate
from metaserver.engine.base import Engine, Snapshot, Space, Transaction
from metaserver.errors import EngineUnusable

if TYPE_CHECKING:
    from metaserver.engine.lmdb import LmdbEngine

__all__ = ["DURABILITIES", "Candidate", "Engine", "Snapshot", "Space", "Transaction", "candidate", "open_engine"]


_PAGE: Final = 4096
_LEAST_MAP: Final = 256 * 1024
_MOST_MAP: Final = 2**46
#: When commits are durable: before they are acknowledged, or soon after (see lmdb.py).
DURABILITIES: Final = ("commit", "interval")


def open_engine(url: str, durability: str = "commit") -> Engine:
    """Open ``lmdb:///directory`` (made if missing) or ``memory://``; raise EngineUnusable or EngineBusy.

    LMDB's URL takes ``?map_size=BYTES``: how large the metadata can become.
    """
    parts = urlsplit(url)
    if parts.scheme == "memory":
        from metaserver.engine.memory import MemoryEngine

        return MemoryEngine()
    if parts.scheme == "lmdb":
        return _open_lmdb(url, parts, durability)
    raise _unknown(url)


def candidate(url: str, address: str, durability: str = "commit") -> Candidate:
    """Return a standing for the authority over an engine, of a metaserver at ``address``; raise EngineUnusable.

    It opens the engine, as :func:`open_engine` does, once it has the authority.
    """
    parts = urlsplit(url)
    if parts.scheme == "memory":
        from metaserver.engine.memory import MemoryCandidate, Store

        return MemoryCandidate(address, Store())
    if parts.scheme == "lmdb":
        from metaserver.engine.lmdb_authority import LmdbCandidate

        return LmdbCandidate(address, _lmdb_directory(url, parts), lambda: _open_lmdb(url, parts, durability))
    raise _unknown(url)


def _unknown(url: str) -> EngineUnusable:
    return EngineUnusable(f"{url}: no such storage engine; known are lmdb:///directory and memory://")


def _open_lmdb(url: str, parts: SplitResult, durability: str) -> LmdbEngine:
    from metaserver.engine.lmdb import LmdbEngine

    map_bytes = _map_size(url, parts.query)
    return LmdbEngine(_lmdb_directory(url, parts), lazy=durability == "interval", map_bytes=map_bytes)


def _lmdb_directory(url: str, parts: SplitResult) -> str:
    if parts.netloc or not parts.path.startswith("/"):
        raise EngineUnusable(f"{url}: write lmdb:///absolute/directory")
    return unquote(parts.path)


def _map_size(url: str, query: str) -> int | None:
    if not query:
        return None
    name, _, text = query.partition("=")
    if name != "map_size" or not text.isascii() or not text.isdigit() or not _LEAST_MAP <= int(text) <= _MOST_MAP:
        raise EngineUnusable(f"{url}: the only option is map_size=BYTES, from {_LEAST_MAP} to {_MOST_MAP}")
    return int(text) // _PAGE * _PAGE
