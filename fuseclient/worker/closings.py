"""Tells the metaserver, in the background, which files are not open for writing any more.

Until it is told, other clients do not cache them; so it may be late, and what is lost with a connection is told when
the session is resumed.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from fuseclient.data.caller import Caller
from fuseclient.worker.rpc import Disconnected, Refused
from metaserver import wire

_log = logging.getLogger(__name__)

#: Seconds for which closings gather.
BATCH_S: Final = 0.05


class Closings:
    """The closings of one mount."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._closed: dict[int, None] = {}
        self._task: asyncio.Task[None] | None = None

    def closed(self, ino: int) -> None:
        """The last writer of a file has gone."""
        self._closed[ino] = None
        if self._task is None:
            self._task = asyncio.create_task(self._tell(), name="closings")

    def opening(self, ino: int) -> None:
        """A file is about to be opened for writing: what was not told yet is not true any more."""
        self._closed.pop(ino, None)

    async def close(self) -> None:
        """Tell no more: the session is about to end, and all that is open in it with it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _tell(self) -> None:
        try:
            while self._closed:
                await asyncio.sleep(BATCH_S)
                inos = list(self._closed)[: wire.MAX_OPEN]
                for ino in inos:
                    del self._closed[ino]
                if inos:
                    await self._caller.call(wire.ClosedForWriting(inos), wire.Done)
        except (Refused, Disconnected) as error:
            _log.info("others do not learn at once that files are closed: %s", error)
        finally:
            self._task = None
