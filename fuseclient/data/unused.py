"""Deletion of the objects that no file uses any more, in the background.

The metaserver lists slices that went out of use. A reader that learned of such a slice just before may still be about
to read its object, so an object is deleted only when it has been seen on the list for a whole lease: a reader that is
slower than that finds it missing and asks the metaserver again. Each client of a volume may do this, at once or
not: deleting and forgetting twice does no harm.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final, Protocol

from fuseclient.data.caller import Caller
from fuseclient.data.objects import StoreError
from fuseclient.worker.rpc import Disconnected, Refused
from metaserver import wire

_log = logging.getLogger(__name__)

#: Slices looked at in one round, and seconds between two rounds.
ROUND_SLICES: Final = 512
ROUND_S: Final = 5.0


class Objects(Protocol):
    """What this needs of :class:`~fuseclient.data.objects.ObjectStore`."""

    async def delete(self, slice_ids: list[int], /) -> None: ...


class UnusedObjects:
    """Deletes objects at most ``ROUND_SLICES`` in ``ROUND_S`` seconds, and none while ``is_busy`` says so."""

    def __init__(self, caller: Caller, store: Objects, lease_s: float, is_busy: Callable[[], bool]) -> None:
        self._caller = caller
        self._store = store
        self._lease_s = lease_s
        self._is_busy = is_busy
        #: When each slice was first seen on the list, on the monotonic clock, in seconds.
        self._seen: dict[int, float] = {}

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await asyncio.sleep(ROUND_S)
            if self._is_busy():
                continue
            try:
                await self.round(time.monotonic())
            except (Refused, Disconnected, StoreError) as error:
                _log.warning("unused objects are not deleted for now: %s", error)

    async def round(self, now_s: float) -> None:
        """Look at the list once; delete what has been on it for a lease."""
        listed = (await self._caller.call(wire.ListSlices(ROUND_SLICES), wire.SliceIds)).ids
        self._seen = {each: self._seen.get(each, now_s) for each in listed}
        old = [each for each, since_s in self._seen.items() if now_s - since_s >= self._lease_s]
        if not old:
            return
        await self._store.delete(old)
        await self._caller.call(wire.ForgetSlices(old), wire.Done)
        for each in old:
            del self._seen[each]
