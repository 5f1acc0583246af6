"""Storage engines, chosen by URL."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from metaserver.engine.base import Engine, Snapshot, Space, Transaction
from metaserver.errors import EngineUnusable

__all__ = ["Engine", "Snapshot", "Space", "Transaction", "open_engine"]


def open_engine(url: str) -> Engine:
    """Open ``lmdb:///directory`` (made if missing) or ``memory://``; raise EngineUnusable or EngineBusy."""
    parts = urlsplit(url)
    if parts.scheme == "memory":
        from metaserver.engine.memory import MemoryEngine

        return MemoryEngine()
    if parts.scheme == "lmdb":
        from metaserver.engine.lmdb import LmdbEngine

        if parts.netloc or not parts.path.startswith("/"):
            raise EngineUnusable(f"{url}: write lmdb:///absolute/directory")
        return LmdbEngine(unquote(parts.path))
    raise EngineUnusable(f"{url}: no such storage engine; known are lmdb:///directory and memory://")
