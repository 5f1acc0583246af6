"""What a metaserver answers while another one has the authority: who that is, how it is itself, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

from metaserver import wire
from metaserver.connection import Answer, Caller
from metaserver.engine.authority import Candidate
from metaserver.errors import Refused
from metaserver.service import SOFTWARE


class Standby:
    """The service of a metaserver that waits. ``elsewhere`` is where the authority is, as far as is known, or empty."""

    def __init__(self, standing: Candidate) -> None:
        self._standing = standing
        self.elsewhere = ""

    async def look(self) -> None:
        """Ask the engine who has the authority."""
        self.elsewhere = await self._standing.holder() or ""

    def welcome(self) -> wire.Welcome:
        return wire.Welcome(wire.PROTOCOL_VERSION, SOFTWARE, 0, self.elsewhere)

    async def answer(self, caller: Caller, frame: wire.Frame) -> Answer:
        if isinstance(frame.request, wire.GetStatus):
            return Answer(wire.Status(SOFTWARE, 0, self.elsewhere))
        raise self._refusal()

    def pages(self, caller: Caller, request: wire.FetchDirectory) -> AsyncIterator[Answer]:
        raise self._refusal()

    def events(self, caller: Caller, request: wire.FollowEvents) -> AsyncGenerator[wire.EventPage, None]:
        raise self._refusal()

    def acknowledge(self, caller: Caller, request: wire.Acknowledge) -> None:
        """There is no session, so no break."""

    def returned(self, caller: Caller, request: wire.ReturnLeases) -> None:
        """Nor does anybody hold anything."""

    def _refusal(self) -> Refused:
        where = f"at {self.elsewhere}" if self.elsewhere else "not known yet"
        return Refused(wire.ErrorCode.BUSY, f"this metaserver is a standby; the authority is {where}")
