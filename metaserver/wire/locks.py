"""Messages about advisory locks."""

from __future__ import annotations

import enum
from typing import Annotated, Final

from msgspec import Meta

from metaserver.wire.base import U32, U63, Ino, Message

#: The last byte of a file that can be locked, and the most locks that one message tells of.
LAST_BYTE: Final = 2**63 - 1
MAX_LOCKS: Final = 2048


class LockOutcome(enum.IntEnum):
    """What a request for a lock came to."""

    GRANTED = 1
    #: Somebody else has it, and it was not to be waited for.
    DENIED = 2
    #: It is told later, by :class:`LockSettled`.
    WAITING = 3
    #: Waiting for it would never end.
    DEADLOCK = 4
    #: The session has, or waits for, too many.
    FULL = 5
    #: It is not waited for any more.
    CANCELLED = 6


class Lock(Message):
    """An advisory lock: bytes ``start`` to ``end``, the last one included, of a file.

    ``owner`` is a number of the session's own choice: locks of one owner do not conflict. ``flock``: one of flock(2),
    of the whole file always, which knows nothing of other locks. ``pid``: of the process, on its session's machine.
    """

    ino: Ino
    owner: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
    flock: bool
    start: U63
    end: U63
    exclusive: bool
    pid: U32 = 0


class TestLock(Message, tag=100):
    """Ask for the first lock of another owner that is in the way of one."""

    #: It is no test of pytest's.
    __test__ = False

    lock: Lock


class SetLock(Message, tag=101):
    """Take a lock, or give it up (``unlock``; its ``exclusive`` says nothing then). It is no change of the volume.

    Unless it is known at once, which is said by WAITING, the outcome comes as :class:`LockSettled`: with ``wait``, as
    soon as there is nothing in the way; without, if a server was started again, as soon as it knows who has what.
    ``number`` is of the client's choice, and rises. The same request over another connection of the session goes on
    where the first one was.
    """

    lock: Lock
    number: U63
    wait: bool = False
    unlock: bool = False


class CancelLock(Message, tag=102):
    """Wait no more for a lock. The reply is CANCELLED; or DENIED, if nothing of that number was waited for."""

    number: U63


class HoldLocks(Message, tag=103):
    """Tell which locks this session holds, in messages of which only the ``last`` has an effect: it has these then, and
    no others, and waits for none. A client that comes back to another run of the server sends it before it renews."""

    locks: Annotated[list[Lock], Meta(max_length=MAX_LOCKS)]
    last: bool


class LockIs(Message, tag=110):
    """The lock that is in the way; ``owner`` and, of another session's, ``pid`` are 0. ``None``: there is none."""

    lock: Lock | None


class LockAnswer(Message, tag=111):
    outcome: LockOutcome


class LocksLost(Message, tag=112):
    """Of the locks that were told, those that the session has not: indexes into all of them, from 0."""

    indexes: list[U32]


class LockSettled(Message, tag=113):
    """What a request that was answered WAITING came to. Sent with id 0; it is lost with its connection."""

    number: U63
    outcome: LockOutcome
