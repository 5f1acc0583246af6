"""The stream of a volume's events, from wherever the volume is served just now.

A volume of a metaserver is asked for there; an embedded one of the metaserver of its mount. While nobody has it
mounted nothing changes: a metaserver of its own tells, for a moment, what is in the log, and for more a mount is waited
for. A stream that breaks off goes on, when the metaserver is back, after the last event that was told.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Final

from fuseclient import runtime, servers
from fuseclient.errors import UserError
from fuseclient.volumes import Embedded, Volume, parse_volume
from fuseclient.worker import finding, rpc
from metaserver import wire

#: The exit code of a command that asked for events that are not kept.
EVENTS_GONE: Final = 3

#: Seconds that a mount may take to begin or to end: its metaserver is there then, but cannot be talked to.
_BETWEEN_S: Final = 10.0
#: Seconds between two looks whether a volume is mounted, and two tries to reach a metaserver.
_PAUSE_S: Final = 0.3


def pages(url: str, since: int | None, *, live: bool, note: Callable[[str], None]) -> Iterator[wire.EventPage]:
    """Yield a volume's events after version ``since`` (0: all that are kept; ``None``: from now on), page by page.

    ``live``: it does not end; ``note`` is told, in a line, when the metaserver is away. Nothing is read ahead while the
    caller has a page. Raises :exc:`UserError`, with EVENTS_GONE as its exit code if some of the events are not kept.
    """
    with asyncio.Runner() as runner:
        yield from _Source(parse_volume(url), since, live, note, runner).pages()


class _NotThere(UserError):
    """No metaserver of a volume has ever answered."""


class _Source:
    def __init__(
        self, volume: Volume, since: int | None, live: bool, note: Callable[[str], None], runner: asyncio.Runner
    ) -> None:
        self._volume = volume
        self._since = since
        self._live = live
        self._note = note
        self._runner = runner
        #: Of the volume, once it was heard.
        self._identity: bytes | None = None
        self._is_away = False
        #: What was in the log at first has been told.
        self._told = False

    def pages(self) -> Iterator[wire.EventPage]:
        deadline = time.monotonic() + _BETWEEN_S
        while True:
            try:
                yield from self._pages_of(self._address())
            except (servers.EngineInUse, _NotThere):
                if self._told or not isinstance(self._volume, Embedded) or time.monotonic() >= deadline:
                    raise
            else:
                if not self._live:
                    return
            time.sleep(_PAUSE_S)

    def _pages_of(self, address: str | None) -> Iterator[wire.EventPage]:
        """Yield what is told at an address; without one, what is in the log, unless that was told before."""
        if address is not None:
            yield from self._stream_until_lost(address, live=self._live)
        elif not self._told:
            assert isinstance(self._volume, Embedded)
            with servers.embedded_server(self._volume, "--no-janitor") as own:
                yield from self._stream_until_lost(own, live=False)
        self._told = True

    def _address(self) -> str | None:
        """Return where the volume's metaserver listens; ``None``: nobody has the volume mounted."""
        volume = self._volume
        if not isinstance(volume, Embedded):
            return volume.address
        if not volume.is_formatted():
            raise UserError(f"{volume.directory} is not a volume; make one with: bpfuse format {volume.url}")
        for record in runtime.live_records():
            if record.url == volume.url:
                return f"unix:{runtime.directory_of(record.mountpoint).metaserver_socket}"
        return None

    def _stream_until_lost(self, address: str, *, live: bool) -> Iterator[wire.EventPage]:
        try:
            yield from self._stream(address, live=live)
        except rpc.Disconnected as error:
            if self._identity is None:
                raise _NotThere(f"no metaserver of {self._volume.url} to talk to: {error}") from None
            if not live:
                raise UserError(f"{error}; to go on: --since {self._since}") from None
            if not self._is_away:
                self._is_away = True
                self._note(f"{self._volume.url} is away ({error}); going on after event {self._since} when it is back")

    def _stream(self, address: str, *, live: bool) -> Iterator[wire.EventPage]:
        request = wire.FollowEvents(self._volume.name, self._since, live)
        stream = _follow(address, request)
        try:
            while (page := self._runner.run(_next(stream))) is not None:
                self._take(page)
                yield page
        except rpc.Refused as refused:
            raise self._refused(refused) from None
        finally:
            self._runner.run(stream.aclose())

    def _take(self, page: wire.EventPage) -> None:
        if self._identity not in (None, page.volume):
            raise UserError(f"{self._volume.url} is another volume now, with events of its own", EVENTS_GONE)
        self._identity, self._since, self._is_away = page.volume, page.version, False

    def _refused(self, refused: rpc.Refused) -> UserError:
        if refused.code is not wire.ErrorCode.EVENTS_GONE:
            return UserError(f"the metaserver of {self._volume.url} refused: {refused}")
        what = str(refused).partition(": ")[2]
        return UserError(f"{self._volume.url}: {what}; read the tree anew, and follow what comes then", EVENTS_GONE)


async def _follow(address: str, request: wire.FollowEvents) -> AsyncGenerator[wire.EventPage, None]:
    connection = await finding.connect(address)
    try:
        async with contextlib.aclosing(connection.follow(request)) as stream:
            async for page in stream:
                yield page
    finally:
        connection.abort()


async def _next(stream: AsyncGenerator[wire.EventPage, None]) -> wire.EventPage | None:
    return await anext(stream, None)
