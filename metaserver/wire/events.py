"""Messages about the feed of changes."""

from __future__ import annotations

import enum
from typing import Annotated, Final

from msgspec import Meta

from metaserver.wire.base import U32, U63, Message, Nanoseconds, VolumeName

#: What is kept of a volume's events unless it is made otherwise: so many, for a week.
KEPT_EVENTS: Final = 500_000
KEPT_S: Final = 7 * 24 * 3600


class Operation(enum.IntEnum):
    """What an :class:`Event` tells of."""

    CREATE = 1
    MKDIR = 2
    SYMLINK = 3
    MKNOD = 4
    LINK = 5
    UNLINK = 6
    RMDIR = 7
    RENAME = 8
    EXCHANGE = 9
    #: Mode, owner or times.
    ATTRIBUTES = 10
    #: Bytes or size; perhaps attributes, too.
    CONTENT = 11
    XATTR = 12
    #: Anything may have changed, by a check that repairs: the tree is to be read anew.
    REPAIR = 13


class Event(Message):
    """One committed change of a volume. ``version`` counts them from 1, in the order of the commits, without gaps.

    ``parent`` and ``name`` are the entry that was made, removed, or exchanged, or (RENAME) where it was; 0 and empty
    for what concerns an inode only. ``new_parent`` and ``new_name``: where it was moved, or what it was exchanged with.
    """

    version: U63
    #: When the change was asked for, by the metaserver's clock.
    time_ns: Nanoseconds
    operation: Operation
    ino: U63 = 0
    #: The type bits of the inode's mode.
    kind: U32 = 0
    #: After the change; of a directory 0.
    size: U63 = 0
    #: Who did it: what the client calls itself, cut to 64 characters.
    client: str = ""
    parent: U63 = 0
    name: bytes = b""
    new_parent: U63 = 0
    new_name: bytes = b""
    #: The inode that a RENAME took the place of, or an EXCHANGE moved the other way; 0: none.
    other: U63 = 0


class FollowEvents(Message, tag=45):
    """Tell of a volume's events after version ``since``, streamed as :class:`EventPage`. Needs no session.

    ``since`` 0: of all that are kept; ``None``: of what comes from now on. EVENTS_GONE: those after it are not all
    kept. ``live``: the stream does not end; a connection carries one such at a time (BUSY).
    """

    volume: VolumeName
    since: U63 | None
    live: bool


class EventPage(Message, tag=80):
    """Some events, by rising version. All up to ``version`` have been told: the place to go on from.

    The first page comes at once, with or without events. No event is told before it is durable.
    """

    version: U63
    events: list[Event]
    last: bool
    #: As in :class:`SessionOpened`.
    volume: Annotated[bytes, Meta(min_length=16, max_length=16)]
