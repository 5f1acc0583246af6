"""``bpfuse gc``: deletes what no file needs, of a volume that is mounted or not.

What is garbage in the store the metaserver knows: the objects of slices on its list of unused ones, and objects that
no chunk uses, which were uploaded for a commit that never came. Those may also be on their way into a file just now. So
they are touched only when they are old, and their slices are *retired* first: after that a commit of them is refused,
so that no file can come to use what is being deleted. A volume that nobody has mounted has no uploads, and age says
nothing.

A reader may have learned of a slice just before it became unused. So while clients may be there, the objects of unused
slices go only when they have been listed for a whole lease; a reader that is slower looks again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from array import array
from collections.abc import AsyncIterator, Sequence
from itertools import groupby
from typing import Final, Protocol, TypeVar

import msgspec

from fuseclient import runtime, servers
from fuseclient.data.objects import Listed, ObjectStore
from fuseclient.errors import UserError
from fuseclient.maintenance import job, stores
from fuseclient.maintenance.job import Amount
from fuseclient.volumes import Embedded, Remote, parse_volume
from fuseclient.worker import finding, rpc
from metaserver import wire

#: Seconds for which an object that no file uses may be on its way into one.
DEFAULT_AGE_S: Final = 3600.0
#: Objects of one request.
_BATCH: Final = 4096

_T = TypeVar("_T", bound=wire.Reply)


class Listener(Protocol):
    """Who is told how far it is."""

    def progress(self, what: str, done: int, total: int) -> None:
        """So much of ``what`` is done; ``total`` is 0 where it is not known."""


class Collected(msgspec.Struct):
    """What was deleted or, in a dry run, would be; and what was left."""

    url: str
    dry_run: bool
    #: Whether clients may have been there.
    online: bool
    #: Inodes that were unlinked, and kept for sessions that have ended.
    orphans: Amount = msgspec.field(default_factory=Amount)
    #: Objects of files deleted or overwritten.
    unused: Amount = msgspec.field(default_factory=Amount)
    #: Objects of commits that never came.
    uncommitted: Amount = msgspec.field(default_factory=Amount)
    #: Uploads that were broken off.
    unfinished: Amount = msgspec.field(default_factory=Amount)
    #: Left: objects that may be on their way into a file, and those that the volume never gave out.
    young: Amount = msgspec.field(default_factory=Amount)
    foreign: Amount = msgspec.field(default_factory=Amount)


def collect(url: str, *, dry_run: bool, age_s: float | None, listener: Listener) -> Collected:
    """Collect a volume's garbage; raise :exc:`UserError`.

    ``age_s``: objects that no file uses are deleted from this age on; ``None``: an hour, or any age if nobody has the
    volume mounted.
    """
    volume = parse_volume(url)
    if isinstance(volume, Remote):
        return asyncio.run(_online(volume, volume.address, dry_run, age_s, listener))
    if not volume.is_formatted():
        raise UserError(f"{volume.directory} is not a volume; make one with: bpfuse format {volume.url}")
    for record in runtime.live_records():
        if record.url == volume.url:
            socket = runtime.directory_of(record.mountpoint).metaserver_socket
            return asyncio.run(_online(volume, f"unix:{socket}", dry_run, age_s, listener))
    return _offline(volume, dry_run, age_s or 0.0, listener)


async def _online(
    volume: Embedded | Remote, address: str, dry_run: bool, age_s: float | None, listener: Listener
) -> Collected:
    collected = Collected(volume.url, dry_run, online=True)
    await _collect_objects(volume.name, address, collected, DEFAULT_AGE_S if age_s is None else age_s, listener)
    return collected


def _offline(volume: Embedded, dry_run: bool, age_s: float, listener: Listener) -> Collected:
    collected = Collected(volume.url, dry_run, online=False)
    collected.orphans = asyncio.run(_clear_up(volume, dry_run, listener))
    with servers.embedded_server(volume, "--no-janitor") as address:
        asyncio.run(_collect_objects(volume.name, address, collected, age_s, listener))
    return collected


async def _clear_up(volume: Embedded, dry_run: bool, listener: Listener) -> Amount:
    """Have the metaserver's garbage cleared up, or counted; return the orphans."""
    orphans = Amount()
    async with job.started("gc", volume.engine_url, volume.name, ["--dry-run"] * dry_run) as child:
        async for message in child.messages():
            if message.progress is not None:
                listener.progress(*message.progress)
            orphans = message.orphans or orphans
    return orphans


async def _collect_objects(name: str, address: str, collected: Collected, age_s: float, listener: Listener) -> None:
    logging.getLogger("fuseclient").addHandler(logging.NullHandler())  # what matters is raised
    try:
        async with _client(name, address) as client:
            with stores.opened(client.opened.store) as store:
                await stores.must_belong(store, client.opened.store, client.opened.volume)
                await _Collector(client, store, collected, age_s, listener).run()
    except rpc.Refused as refused:
        raise UserError(f"the metaserver of {collected.url} refused: {refused}") from None
    except rpc.Disconnected as error:
        raise UserError(f"no metaserver of {collected.url} to talk to: {error}") from None


# The metaserver


class _Client:
    """A session that is kept alive."""

    def __init__(self, connection: rpc.Connection, opened: wire.SessionOpened) -> None:
        self.opened = opened
        self._connection = connection

    @property
    def lease_s(self) -> float:
        return self.opened.lease_ms / 1000

    async def call(self, request: wire.Request, kind: type[_T]) -> _T:
        return await self._connection.call(request, kind)

    async def renew(self) -> None:
        """Renew the lease until cancelled."""
        seen = self.opened.version
        with contextlib.suppress(rpc.Disconnected, rpc.Refused):  # the next call finds it, and says so
            while True:
                await asyncio.sleep(self.lease_s / 3)
                seen = (await self.call(wire.Renew(seen), wire.Renewed)).version


@contextlib.asynccontextmanager
async def _client(name: str, address: str) -> AsyncIterator[_Client]:
    connection = await finding.connect(address)
    try:
        opened = await connection.call(wire.OpenSession(name, "gc"), wire.SessionOpened)
        client = _Client(connection, opened)
        renewing = asyncio.create_task(client.renew())
        try:
            yield client
        finally:
            renewing.cancel()
            await asyncio.wait({renewing})
            with contextlib.suppress(rpc.Disconnected, rpc.Refused):
                await client.call(wire.CloseSession(), wire.Done)
    finally:
        connection.abort()


# The store


class _Collector:
    def __init__(
        self, client: _Client, store: ObjectStore, collected: Collected, age_s: float, listener: Listener
    ) -> None:
        self._client = client
        self._store = store
        self._collected = collected
        self._listener = listener
        self._seen = 0
        self._deleted = 0
        # No commit can be late by more than two leases: a session that was away for one has ended.
        least_s = 2 * client.lease_s if collected.online else 0.0
        self._born_before_s = time.time() - max(age_s, least_s)

    async def run(self) -> None:
        unused = await self._list_unused()
        listed_s = time.monotonic()
        batch: list[Listed] = []
        async for page in self._store.list():
            batch += page
            if len(batch) >= _BATCH // 2:
                await self._sort_out(batch)
                batch = []
        await self._sort_out(batch)
        if not self._collected.dry_run:
            if unused and self._collected.online:
                await self._wait(listed_s + self._client.lease_s)
            for part in unused:
                await self._delete(part, "unused objects")

    async def _list_unused(self) -> list[array[int]]:
        """Return all slices that are unused now, in parts as large as can be forgotten at once."""
        parts: list[array[int]] = []
        last = 0
        while ids := (await self._client.call(wire.ListSlices(_BATCH, last), wire.SliceIds)).ids:
            parts.append(array("Q", ids))
            last = ids[-1]
        return parts

    async def _sort_out(self, batch: list[Listed]) -> None:
        """Count some objects, and delete those that no commit can come for."""
        if not batch:
            return
        ids = sorted({each.slice_id for each in batch if 0 < each.slice_id < 2**63})
        states = await self._client.call(wire.InspectSlices(ids), wire.SlicesInspected)
        idle, unused, foreign = set(states.idle), set(states.unused), set(states.foreign)
        gone: list[int] = []
        for slice_id, group in groupby(batch, lambda each: each.slice_id):
            versions = list(group)
            if slice_id in idle:
                gone += self._judge(slice_id, versions)
            elif slice_id in unused or slice_id in foreign:
                self._count(self._collected.unused if slice_id in unused else self._collected.foreign, versions)
        if not self._collected.dry_run:
            for retired in [part async for part in self._retire(gone)]:
                await self._delete(retired, "uncommitted objects")
        self._seen += len(batch)
        self._listener.progress("objects", self._seen, 0)

    def _judge(self, slice_id: int, versions: list[Listed]) -> list[int]:
        """Count an object that no file uses; return its id if it is to go."""
        if any(each.stored_s > self._born_before_s for each in versions):
            self._count(self._collected.young, versions)
            return []
        self._count(self._collected.uncommitted, [each for each in versions if not each.unfinished])
        self._count(self._collected.unfinished, [each for each in versions if each.unfinished])
        return [slice_id]

    @staticmethod
    def _count(amount: Amount, objects: list[Listed]) -> None:
        for each in objects:
            amount.add(each.bytes)

    async def _retire(self, ids: list[int]) -> AsyncIterator[list[int]]:
        """Retire slices and yield those that were: by now no commit of them can be granted."""
        waiting = [ids] if ids else []
        while waiting:
            part = waiting.pop()
            try:
                yield (await self._client.call(wire.RetireSlices(part), wire.SliceIds)).ids
            except rpc.Refused as refused:
                if refused.code is not wire.ErrorCode.TOO_LARGE or len(part) < 2:
                    raise
                waiting += [part[len(part) // 2 :], part[: len(part) // 2]]

    async def _delete(self, ids: Sequence[int], what: str) -> None:
        """Delete objects, and have their slices forgotten."""
        if self._client.opened.lazy:  # a crash must not bring a file back that used them
            await self._client.call(wire.Sync(), wire.Done)
        await self._store.delete(ids)
        await self._client.call(wire.ForgetSlices(list(ids)), wire.Done)
        self._deleted += len(ids)
        self._listener.progress(what, self._deleted, 0)

    async def _wait(self, until_s: float) -> None:
        """Give readers the time to look at what has just become unused."""
        lease_s = round(self._client.lease_s)
        while (left_s := until_s - time.monotonic()) > 0:
            self._listener.progress("seconds for readers", max(0, lease_s - round(left_s)), lease_s)
            await asyncio.sleep(min(left_s, 0.5))
