"""Finding, of the metaservers of a volume, the one that has the authority.

All are asked at once, so one that is gone, or hangs, holds nothing up. A standby says where the authority is, as far as
it knows, so it is found at an address that the user did not name, too. While those that answer are about to agree on
another one they are asked again.

Who has the authority tells of all metaservers there are, and goes on to tell with each renewal of the lease: a mount
finds the next one though none of those that it began with is left (known.py). Nobody is believed about how they
are to be asked: it is with the same credentials, and over TLS if the one that told was asked so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from fuseclient.credentials import Credentials
from fuseclient.worker import rpc
from fuseclient.worker.rpc import Connection, Disconnected, Refused
from metaserver import wire

#: Seconds between two rounds of asking.
_AGAIN_S: Final = 0.2


async def connect(addresses: str, *, timeout_s: float = rpc.CONNECT_TIMEOUT_S) -> Connection:
    """Connect to the metaserver that has the authority.

    ``addresses``: "unix:/path" or "tcp:host:port", or several with commas between them, and with one
    query for all (see credentials.py). Raises :exc:`Disconnected` when
    none has it in time, :exc:`Refused` (UNSUPPORTED) when they speak another version of the protocol, and
    :exc:`ValueError` for what is not an address.
    """
    addresses, mark, query = addresses.partition("?")
    places = [str(place) for place in wire.parse_addresses(addresses)]
    search = _Search(mark + query)
    try:
        async with asyncio.timeout(timeout_s):
            connection = await search.ask(places)
            while connection is None:
                connection = await search.ask_later(places)
            return connection
    except TimeoutError:
        raise Disconnected(search.why or f"{addresses} does not answer within {timeout_s:g} s") from None
    finally:
        search.end()


class _Search:
    """One search, with a query for each address; ``why`` says in a line why it has come to nothing so far."""

    def __init__(self, query: str) -> None:
        self.why = ""
        self._query = query
        self._credentials = Credentials.parse(query.removeprefix("?"))
        #: One has answered, so there is, or will be, an authority.
        self._standby = False
        self._asked: dict[str, asyncio.Task[Connection]] = {}

    async def ask(self, places: Iterable[str]) -> Connection | None:
        """Ask once, and return the connection to who has the authority; ``None``: there are standbys only, or were.

        Who has not answered soon after a standby has goes on being asked. If nobody has answered, raises what the last
        one met.
        """
        known: set[str] = set()
        failure: Disconnected | Refused | None = None
        self._add(known, *places)
        while self._asked:
            patience_s = _AGAIN_S if self._standby else None
            await asyncio.wait(self._asked.values(), return_when=asyncio.FIRST_COMPLETED, timeout=patience_s)
            place = next((place for place, task in self._asked.items() if task.done()), None)
            if place is None:
                return None
            try:
                connection = await self._asked.pop(place)
            except (Disconnected, Refused) as error:
                failure = error
                continue
            if connection.welcome.server_epoch:
                return connection
            self._standby = True
            elsewhere = connection.welcome.elsewhere
            connection.abort()
            self.why = f"{place} is a standby; the authority is {f'at {elsewhere}' if elsewhere else 'not known yet'}"
            if may_follow(place, elsewhere, self._credentials):
                self._add(known, elsewhere)
        if failure is not None and not self._standby:
            raise failure
        return None

    async def ask_later(self, places: Iterable[str]) -> Connection | None:
        """As :meth:`ask`, after a while."""
        await asyncio.sleep(_AGAIN_S)
        return await self.ask(places)

    def end(self) -> None:
        """Ask nobody any more."""
        for task in self._asked.values():
            task.add_done_callback(_discard)
            task.cancel()
        self._asked.clear()

    def _add(self, known: set[str], *places: str) -> None:
        for place in places:
            if place not in known and place not in self._asked:
                known.add(place)
                self._asked[place] = asyncio.create_task(rpc.connect(place + self._query))


def may_follow(place: str, elsewhere: str, credentials: Credentials) -> bool:
    """Say whether it is an address that this place may name.

    Another machine knows of no socket of this one, and who is asked over TLS may not name one that would not be.
    """
    try:
        teller, target = wire.parse_address(place), wire.parse_address(elsewhere)
    except ValueError:
        return False
    if isinstance(teller, wire.UnixAddress) or isinstance(target, wire.UnixAddress):
        return isinstance(teller, wire.UnixAddress)
    return credentials.needs_tls(target.host) or not credentials.needs_tls(teller.host)


def _discard(task: asyncio.Task[Connection]) -> None:
    """End the connection that nobody waits for any more."""
    if not task.cancelled() and task.exception() is None:
        task.result().abort()
