"""Who may serve from an engine: of the metaservers that stand for it, one at a time has the authority.

The engine itself chooses, by what it has for that: LMDB by a lock on its directory, others by a lock or key of their
own that lapses within ``LAPSE_S`` when its holder does not renew it any more: it was killed, hangs or is cut off. A
holder that runs learns by itself that it has lost it, not later than the engine may give it to the next.

That alone would not do: a holder that was stopped believes in its authority until it is told. So who has won begins
the next epoch in the engine (:meth:`metaserver.fencing.Tenure.begin`), and every transaction compares the epoch: what
an earlier authority tries after that is refused by the engine's own serialisability.

Who stands also says so, again and again, whoever has the authority: so clients are told of all whom they may find
it at (:meth:`Candidate.announce`).

To stand is to be polled for: :meth:`Candidate.take` tries once, and :meth:`Candidate.wait` does it until it succeeds.
"""

from __future__ import annotations

import abc
import asyncio
import random
from collections.abc import Callable
from typing import Final

from metaserver.engine.base import Engine
from metaserver.errors import EngineBusy

#: Seconds that the authority of a holder that is gone can outlive it, on engines that cannot tell at once.
LAPSE_S: Final = 3.0
#: Seconds for which it is remembered that a metaserver has said that it stands, and between two times that it does.
ANNOUNCED_S: Final = 10.0
ANNOUNCE_S: Final = 3.0
#: Seconds between two attempts.
_POLL_S: Final = 0.1


class Candidate(abc.ABC):
    """One metaserver's standing for the authority over an engine; ``address`` is where clients reach it, or empty.

    Taken once, lost or resigned once; who wants it again makes another one. ``on_lost`` is to be set before it is
    taken: it is called on the event loop with a line that says why, at most once, as soon as the authority is lost
    otherwise than by :meth:`resign`. The engine then still runs, and refuses by its epoch.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.on_lost: Callable[[str], object] = lambda why: None

    @abc.abstractmethod
    async def take(self) -> Engine:
        """Take the authority and return the engine, ready to be written to.

        Raises :exc:`EngineBusy` if another has it, and :exc:`~metaserver.errors.EngineUnusable`.
        """

    @abc.abstractmethod
    async def holder(self) -> str | None:
        """Return the address of who has the authority, as far as the engine knows now: he may just have died."""

    @abc.abstractmethod
    async def announce(self) -> list[str]:
        """Say that this one stands, if clients can reach it; return the addresses of all that have said so.

        It is remembered until :meth:`resign`, or ``ANNOUNCED_S`` at most after this one has died. Raises EngineError.
        """

    @abc.abstractmethod
    async def resign(self) -> None:
        """Close the engine and let the next one have the authority at once, if it is this one's; or do nothing."""

    async def wait(self) -> Engine:
        """Take the authority as soon as nobody else has it; raises as :meth:`take` does, but for EngineBusy."""
        while True:
            try:
                return await self.take()
            except EngineBusy:
                await asyncio.sleep(_POLL_S * random.uniform(0.5, 1.5))
