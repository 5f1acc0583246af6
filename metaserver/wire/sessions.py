"""Messages of a connection and its session: handshake, volumes, lease, breaks, open files."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from metaserver.wire.base import (
    MAX_INLINE,
    MAX_OPEN,
    MAX_RETURNED,
    U32,
    U63,
    Ino,
    Message,
    Name,
    Places,
    SessionId,
    VolumeName,
)
from metaserver.wire.events import KEPT_EVENTS, KEPT_S
from metaserver.wire.tokens import MAX_TOKEN


class Hello(Message, tag=1):
    """The first message of a connection. Until it is answered nothing else is looked at."""

    version: U32
    software: Annotated[str, Meta(max_length=64)]
    #: Sent over TLS, a unix socket or the loopback device only.
    token: Annotated[str, Meta(max_length=MAX_TOKEN)] | None = None

    def __repr__(self) -> str:
        shown = None if self.token is None else "..."
        return f"Hello(version={self.version!r}, software={self.software!r}, token={shown!r})"


class CreateVolume(Message, tag=2):
    name: VolumeName
    store: Annotated[str, Meta(max_length=4096)]
    inline_limit: Annotated[int, Meta(ge=0, le=MAX_INLINE)]
    #: How many events are kept at most, and for how many seconds.
    kept_events: Annotated[int, Meta(ge=1, le=2**40)] = KEPT_EVENTS
    kept_s: Annotated[int, Meta(ge=1, le=2**40)] = KEPT_S
    #: The slice id to begin with: above those of objects that are in the store already.
    first_slice: Annotated[int, Meta(ge=1, le=2**62)] = 1


class OpenSession(Message, tag=3):
    """Open a session on a volume. Every other request below needs one on its connection.

    ``resume`` continues an earlier session of this client over a new connection; if that is gone a new one is opened,
    which the reply says. ``writing``: what this client has open for writing in it.
    """

    volume: VolumeName
    client: Annotated[str, Meta(max_length=256)]
    resume: SessionId | None = None
    writing: Annotated[list[Ino], Meta(max_length=MAX_OPEN)] = []
    #: What the client is, for operators.
    software: Annotated[str, Meta(max_length=64)] = ""


class Renew(Message, tag=4):
    """Renew the lease. ``seen`` is the version up to which this client has been told of others' changes."""

    seen: U63


class CloseSession(Message, tag=5):
    pass


class GetStatistics(Message, tag=24):
    pass


class OpenFile(Message, tag=34):
    """As GetAttributes, of what is to be opened: NOT_FOUND for an orphan that this client had not open before.

    ``writing``: what others are told of the inode they do not keep, until this client has closed it.
    """

    ino: Ino
    writing: bool


class ClosedForWriting(Message, tag=35):
    """This client has these inodes open for writing no more."""

    inos: Annotated[list[Ino], Meta(max_length=MAX_OPEN)]


class Sync(Message, tag=40):
    """Make durable every change of this session that was replied to. INTERNAL, once: some of them are lost."""


class Acknowledge(Message, tag=120):
    """All that the Break of this number told has left every cache of this client. Sent with id 0; has no reply.

    ``open``: those of the inodes that are open here, perhaps: when they are unlinked they live on for this client too,
    until it reaps them.
    """

    number: U63
    open: Annotated[list[Ino], Meta(max_length=MAX_OPEN)] = []


class ReturnLeases(Message, tag=119):
    """This client has nothing in any cache of these inodes, nor of the names in these directories, and it uses no reply
    under way to keep anything of them: it need not be told of changes. Sent with id 0; has no reply.

    What it asks for after this, on the same connection, it holds again.
    """

    directories: Annotated[list[Ino], Meta(max_length=MAX_RETURNED)]
    inodes: Annotated[list[Ino], Meta(max_length=MAX_RETURNED)]


class Welcome(Message, tag=66):
    version: U32
    software: Annotated[str, Meta(max_length=64)]
    #: Grows with each start of a server, and with each change of the authority. 0: of a standby.
    server_epoch: U63
    #: Of a standby: where the authority is; empty: that is not known.
    elsewhere: Annotated[str, Meta(max_length=512)] = ""
    #: Of who has the authority: where it and those that may have it next can be reached.
    metaservers: Places = []


class SessionOpened(Message, tag=67):
    session: SessionId
    lease_ms: Annotated[int, Meta(ge=100, le=3_600_000)]
    #: The volume's version at this moment: what :class:`Renew` starts from.
    version: U63
    store: str
    inline_limit: Annotated[int, Meta(ge=0, le=MAX_INLINE)]
    #: Whether ``resume`` was honoured; if not, nothing cached before may be used.
    resumed: bool
    #: Random, of the volume: names what a client keeps of it beyond its sessions.
    volume: Annotated[bytes, Meta(min_length=16, max_length=16)] = bytes(16)
    #: Replies to changes come before these are durable; :class:`Sync` makes them so.
    lazy: bool = False
    #: No other client has a session on the volume, nor gets one before a Break says ``joined``.
    alone: bool = False
    #: The metaserver may lose, when it crashes, changes that were asked for as lazy and not synced since.
    puts_off: bool = True
    #: Every change is refused as READ_ONLY.
    read_only: bool = False


class Renewed(Message, tag=68):
    """The lease is extended by ``lease_ms`` from when the client sent its renewal.

    ``names`` and ``inodes`` are what other sessions have changed in (seen, version]: entries as (directory, name), and
    inodes whose attributes, content, xattrs or listing changed. They are to be dropped from every cache before the
    new deadline is used. ``everything``: the history does not reach back to ``seen``; drop all.
    """

    lease_ms: Annotated[int, Meta(ge=100, le=3_600_000)]
    version: U63
    names: list[tuple[Ino, Name]]
    inodes: list[Ino]
    everything: bool
    #: As in :class:`Welcome`.
    metaservers: Places = []


class Statistics(Message, tag=77):
    """Figures of the volume and of the engine's file system (``total_bytes`` and ``free_bytes``)."""

    inodes: U63
    bytes: U63
    total_bytes: U63
    free_bytes: U63


class Break(Message, tag=121):
    """Drop these from every cache, kernel and maps included: entries as (directory, name), and inodes with attributes,
    content and xattrs; or all there is. Then acknowledge ``number``, unless that is 0.

    What was asked for before this came and is answered after it must not be cached under these keys. With a number of
    0 nobody waits: the keys belong to replies that follow and that are not to be cached. ``written``: others have these
    inodes open for writing, so that each request about them is to be sent; there is nothing to be dropped.
    """

    number: U63
    names: list[tuple[Ino, Name]]
    inodes: list[Ino]
    everything: bool = False
    written: list[Ino] = []
    #: Another client is about to open a session: to be acknowledged when nothing waits any more that it would not see.
    joined: bool = False
