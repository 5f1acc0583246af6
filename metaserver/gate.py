"""Who a connection is: decided once, before anything but its handshake is looked at.

* A unix socket: processes of root and of the metaserver's own user, by the kernel's word (SO_PEERCRED).
* The loopback device, in plaintext: whoever is on this machine, unless ``require_identity``.
* TLS: who shows a token, or a certificate that the client CA has signed, of an identity in the engine.
* Plaintext from elsewhere is never listened for, unless ``insecure``: then it is anybody, with root's rights taken away
  unless ``squash`` says otherwise.

Who shows a token or a certificate is that identity, wherever it comes from, or is refused.

An :class:`Account` is what one identity has under way over all its connections. Connections that have not yet said who
they are have no part in anybody's limits: there are so many of them at most, and the oldest gives way to the next.

Everything runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import logging
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

from metaserver import identities, wire
from metaserver.engine.base import Engine
from metaserver.errors import Refused
from metaserver.identities import ANYBODY, LOCAL, Known, Shown
from metaserver.tls import Tls, certificate_name

_log = logging.getLogger(__name__)

_CREDENTIALS: Final = struct.Struct("3i")


class Access(NamedTuple):
    """How clients may come to a metaserver."""

    tls: Tls | None = None
    #: Plaintext that other machines can reach is allowed.
    insecure: bool = False
    #: Who is on this machine has to show who he is, too.
    require_identity: bool = False
    #: What becomes of the rights of those without an identity that come from other machines.
    squash: wire.Squash = wire.Squash.AUTO


class Half(Protocol):
    """A connection that has not said yet who it is."""

    def cut(self, reason: str) -> None: ...


class Account:
    """What an identity has under way. ``is_near``: on this machine; ``expires_s``: in seconds since 1970, 0: never."""

    def __init__(self, known: Known, is_near: bool) -> None:
        self.identity = known.identity
        #: Sessions belong to it; nothing for those that have no identity in the engine.
        self.owner = known.serial
        self.is_near = is_near
        self.in_flight = 0
        self.is_revoked = False
        self.connections: dict[Half, None] = {}
        #: Called, once each, when there is room for another request.
        self.waiting: dict[Callable[[], object], None] = {}

    @property
    def is_named(self) -> bool:
        """Whether it is an identity of the engine."""
        return len(self.owner) > 1

    @property
    def squash(self) -> wire.Squash:
        """What becomes of its users' rights."""
        if self.identity.squash is not wire.Squash.AUTO:
            return self.identity.squash
        return wire.Squash.NONE if self.is_near else wire.Squash.ROOT

    def finished(self) -> None:
        """A request has ended."""
        self.in_flight -= 1
        if self.waiting:
            waiting = next(iter(self.waiting))
            del self.waiting[waiting]
            waiting()


class Halves:
    """Connections that have not said who they are: ``most`` of them, and the oldest gives way to the next."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._halves: dict[Half, None] = {}

    def __len__(self) -> int:
        return len(self._halves)

    def enter(self, half: Half) -> None:
        """A connection has come."""
        self._halves[half] = None
        if len(self._halves) > self._most:
            oldest = next(iter(self._halves))
            self.leave(oldest)
            oldest.cut("too many connections do not say who they are")

    def leave(self, half: Half) -> None:
        """A connection has said who it is, or is gone."""
        self._halves.pop(half, None)

    def close(self, reason: str) -> None:
        """Nobody is let in any more."""
        for half in list(self._halves):
            half.cut(reason)


class Gate:
    """Lets connections in. ``half_open`` of them may be undecided; ``wall`` is in nanoseconds since 1970."""

    def __init__(self, engine: Engine, access: Access, half_open: int, wall: Callable[[], int] = time.time_ns) -> None:
        self.access = access
        self.halves = Halves(half_open)
        self._engine = engine
        self._wall = wall
        self._revocations = 0
        #: Connections of which it is known whose they are.
        self.admitted = 0
        #: Called with each account that has ended before its time.
        self.on_end: Callable[[Account], object] = lambda account: None
        #: By serial and place.
        self._accounts: dict[tuple[bytes, bool], Account] = {}

    # Who they are

    def shown(self, transport: asyncio.BaseTransport, token: str | None) -> tuple[Shown, float] | None:
        """Return what a client shows of itself, and when that ends; ``None``: nothing."""
        certificate = certificate_name(transport)
        if token is None and certificate is None:
            return None
        name, end_s = certificate or (None, 0.0)
        return Shown(token, name), end_s

    def without_identity(self, transport: asyncio.BaseTransport) -> Account:
        """Return the account of a client that shows nothing; raise :exc:`Refused` (NOT_AUTHENTICATED)."""
        is_near = self._is_near(transport)
        access = self.access
        if is_near and transport.get_extra_info("ssl_object") is None and not access.require_identity:
            return self._account(Known(LOCAL, b"", b""), True)
        if access.insecure and not access.require_identity:
            if access.squash is wire.Squash.NONE:
                return self._account(Known(LOCAL, b"", b""), False)
            return self._account(Known(_squashed(access.squash), b"", b"*"), False)
        raise Refused(wire.ErrorCode.NOT_AUTHENTICATED, "a token or a certificate has to be shown here")

    async def with_identity(self, transport: asyncio.BaseTransport, shown: Shown) -> Account:
        """Return the account of a client that shows something; raise :exc:`Refused` (NOT_AUTHENTICATED)."""
        is_near = self._is_near(transport)
        if shown.token is not None and not is_near and transport.get_extra_info("ssl_object") is None:
            raise Refused(wire.ErrorCode.NOT_AUTHENTICATED, "a token was sent in plaintext: revoke it")
        recognise = functools.partial(identities.recognise, shown=shown, now_s=self._wall() / 1e9)
        while True:
            revocations = self._revocations
            known = await self._engine.read(recognise)
            if revocations == self._revocations:  # what was read before one may be of what it has revoked
                return self._account(known, is_near)

    def _account(self, known: Known, is_near: bool) -> Account:
        account = self._accounts.get((known.serial, is_near))
        if account is None:
            account = self._accounts[known.serial, is_near] = Account(known, is_near)
        return account

    def opened(self, account: Account, connection: Half) -> None:
        """A connection belongs to an account now."""
        account.connections[connection] = None
        self.admitted += 1

    def closed(self, account: Account, connection: Half) -> None:
        """It is gone."""
        account.connections.pop(connection, None)
        self.admitted -= 1
        if not account.connections and self._accounts.get((account.owner, account.is_near)) is account:
            del self._accounts[account.owner, account.is_near]

    # Until when

    def revoked(self, name: str) -> None:
        """An identity is not in the engine any more: end all that it has, now."""
        self._revocations += 1
        for account in [each for each in self._accounts.values() if each.is_named and each.identity.name == name]:
            self._end(account, f"{name} was revoked")

    def end_expired(self) -> None:
        """End what identities have that have expired."""
        now_s = self._wall() / 1e9
        for account in [each for each in self._accounts.values() if identities.is_over(each.identity, now_s)]:
            self._end(account, f"{account.identity.name} has expired")

    def _end(self, account: Account, reason: str) -> None:
        account.is_revoked = True
        del self._accounts[account.owner, account.is_near]
        self.on_end(account)
        for connection in list(account.connections):
            connection.cut(reason)

    def _is_near(self, transport: asyncio.BaseTransport) -> bool:
        """Whether a client is on this machine, and allowed to be; raise :exc:`Refused` for another user's."""
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family == socket.AF_UNIX:
            _check_peer(sock)
            return True
        return _is_loopback(transport.get_extra_info("peername"))


def _squashed(squash: wire.Squash) -> wire.Identity:
    return ANYBODY if squash is wire.Squash.AUTO else wire.Identity(ANYBODY.name, squash=squash)


def _check_peer(sock: socket.socket) -> None:
    """Raise :exc:`Refused` unless root or this process's own user is at the other end of a unix socket."""
    _, uid, _ = _CREDENTIALS.unpack(_peer_credentials(sock))
    if uid not in (0, os.geteuid()):
        raise Refused(wire.ErrorCode.NOT_AUTHENTICATED, f"uid {uid} may not use this socket")


def _peer_credentials(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)


def _is_loopback(peer: Any) -> bool:
    try:
        address = ipaddress.ip_address(peer[0])
    except (TypeError, ValueError, IndexError):
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


class Unguarded:
    """The gate of a metaserver that only tells where the authority is: it cannot know who anybody is."""

    def __init__(self, half_open: int) -> None:
        self.halves = Halves(half_open)
        self.admitted = 0
        self._nobody = Account(Known(wire.Identity("nobody", volumes=[]), b"", b"*"), False)

    def shown(self, transport: asyncio.BaseTransport, token: str | None) -> None:
        """What is shown is not looked at."""

    def without_identity(self, transport: asyncio.BaseTransport) -> Account:
        """Return the account of whoever comes."""
        return self._nobody

    async def with_identity(self, transport: asyncio.BaseTransport, shown: Shown) -> Account:
        """It is the same."""
        return self._nobody

    def opened(self, account: Account, connection: Half) -> None:
        """A connection was let in."""
        self.admitted += 1

    def closed(self, account: Account, connection: Half) -> None:
        """It is gone."""
        self.admitted -= 1
