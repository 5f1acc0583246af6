"""The authority over the simulated engine: a lease in it, as of an engine on other machines.

A holder renews it while its node runs. One that is frozen, or dead, loses it without being told; when it goes on it
finds out, perhaps only after it has tried this and that.
"""

from __future__ import annotations

import asyncio

from metaserver.engine.authority import LAPSE_S, Candidate
from metaserver.engine.base import Engine
from metaserver.errors import EngineBusy


class Authority:
    """Who has it, and until when unless he renews it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, engine: Engine) -> None:
        self.engine = engine
        self.holder: LeasedCandidate | None = None
        self._loop = loop
        self._until = 0.0

    @property
    def is_free(self) -> bool:
        return self.holder is None or self._loop.time() >= self._until

    def renew(self) -> None:
        self._until = self._loop.time() + LAPSE_S


class LeasedCandidate(Candidate):
    """A metaserver's standing; the engine is not closed with it."""

    def __init__(self, address: str, authority: Authority) -> None:
        super().__init__(address)
        self._authority = authority
        self._renewing: asyncio.Task[None] | None = None

    async def take(self) -> Engine:
        if not self._authority.is_free:
            raise EngineBusy("another metaserver has the authority")
        self._authority.holder = self
        self._authority.renew()
        self._renewing = asyncio.create_task(self._renew())
        return self._authority.engine

    async def _renew(self) -> None:
        while self._authority.holder is self:
            self._authority.renew()
            await asyncio.sleep(LAPSE_S / 3)
        self.on_lost("the lease was not renewed in time")

    async def holder(self) -> str | None:
        return self._authority.holder.address if self._authority.holder is not None else None

    async def announce(self) -> list[str]:
        return [self.address]

    async def resign(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
        if self._authority.holder is self:
            self._authority.holder = None
