"""``bpfuse dump`` and ``bpfuse load``: a volume's metadata to a file, and to another engine."""

from __future__ import annotations

from typing import Protocol

from fuseclient import runtime
from fuseclient.errors import UserError
from fuseclient.maintenance import job
from fuseclient.maintenance.job import Moved
from fuseclient.volumes import Embedded, parse_volume


class Listener(Protocol):
    """Who is told how far it is."""

    def progress(self, what: str, done: int, total: int) -> None:
        """So much of ``what`` is done; ``total`` is an estimate, 0 if there is none."""


async def dump(url: str, file: str, volume: str, listener: Listener) -> Moved:
    """Write a volume to a file that does not exist; raise :exc:`UserError`."""
    place = _place(url)
    if isinstance(place, Embedded) and not place.is_formatted():
        raise UserError(f"{place.directory} holds no volume")
    return await _move("dump", place, volume, file, listener)


async def load(file: str, url: str, volume: str, listener: Listener) -> Moved:
    """Make a volume of a file on an engine; raise :exc:`UserError`."""
    place = _place(url)
    if isinstance(place, Embedded):
        raise UserError(f"{place.url} is an embedded volume: what is loaded goes to the engine of a metaserver")
    return await _move("load", place, volume, file, listener)


def _place(url: str) -> Embedded | str:
    """Return an embedded volume that is not mounted, or an engine's URL."""
    if url.startswith("bpfuse://"):
        raise UserError(f"{url} is a metaserver's: name its engine, as it does (lmdb:///directory, etcd://...)")
    if not url.startswith("file://"):
        return url
    place = parse_volume(url)
    assert isinstance(place, Embedded)
    for record in runtime.live_records():
        if record.url == place.url:
            raise UserError(f"{place.url} is mounted at {record.mountpoint}: unmount it first")
    return place


async def _move(command: str, place: Embedded | str, volume: str, file: str, listener: Listener) -> Moved:
    engine = place.engine_url if isinstance(place, Embedded) else place
    async with job.started(command, engine, volume, ["--file", file]) as child:
        moved: Moved | None = None
        async for message in child.messages():
            if message.progress is not None:
                listener.progress(*message.progress)
            moved = message.moved or moved
    assert moved is not None
    return moved
