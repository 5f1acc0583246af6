"""The seam between the file system's verbs and an ordered key-value store.

An engine gives serialisable transactions over byte keys in lexicographic order. A transaction is a synchronous
function, the body, called with a :class:`Transaction`; it may be called again after a conflict, so it must have no
effect but through that argument. What a body reads, ranges included, is part of its conflict set: a key that another
transaction inserts into or deletes from a range that was read is a conflict, too.

Limits hold on every engine, so that what works on one works on all; they are checked here, before the store is asked.
"""

from __future__ import annotations

import abc
import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeVar

from metaserver.errors import Conflict, LimitExceeded

#: Bytes of a key.
MAX_KEY: Final = 400
#: Bytes of a value: 64 KiB of file content and a record's own overhead.
MAX_VALUE: Final = 64 * 1024 + 512
#: Different keys that one transaction writes.
MAX_WRITES: Final = 100
#: Bytes of keys and values that one transaction writes.
MAX_TRANSACTION: Final = 1024 * 1024

#: A conflicting transaction is tried this often before :exc:`Conflict` reaches the caller.
_ATTEMPTS: Final = 32
#: Seconds of the first and of the longest pause between two attempts.
_FIRST_PAUSE: Final = 0.0005
_LONGEST_PAUSE: Final = 0.05

T = TypeVar("T")
Row = tuple[bytes, bytes]


class Space(NamedTuple):
    """Bytes of the file system (or memory) that the engine stores its data in."""

    total: int
    free: int


class Snapshot(abc.ABC):
    """A consistent view of the store. Valid only while the body that was given it runs."""

    @abc.abstractmethod
    def get(self, key: bytes) -> bytes | None:
        """Return a key's value, or ``None``."""

    @abc.abstractmethod
    def range(self, start: bytes, end: bytes, limit: int | None = None, reverse: bool = False) -> list[Row]:
        """Return the keys in [start, end) with their values, at most ``limit``, from the end if ``reverse``."""

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values of keys, in their order; where a read is a round trip, all in one."""
        return [self.get(key) for key in keys]

    @abc.abstractmethod
    def space(self) -> Space:
        """Return how large the engine's storage is and how much of it is free; no part of the conflict set."""


class Transaction(Snapshot):
    """A view that can be written, and sees its own writes."""

    def __init__(self) -> None:
        self._keys: set[bytes] = set()
        self._bytes = 0

    @property
    def room(self) -> int:
        """The number of further keys that this transaction may write."""
        return MAX_WRITES - len(self._keys)

    @property
    def bytes_left(self) -> int:
        """The bytes of keys and values that this transaction may still write."""
        return MAX_TRANSACTION - self._bytes

    def is_new(self, prefix: bytes) -> None:
        """Nothing is, or ever was, stored whose key begins so: a number in it is given out by this transaction."""

    def put(self, key: bytes, value: bytes) -> None:
        """Set a key's value; raise :exc:`LimitExceeded`."""
        if len(value) > MAX_VALUE:
            raise LimitExceeded(f"a value of {len(value)} bytes; the limit is {MAX_VALUE}")
        self._count(key, len(value))
        self._put(key, value)

    def delete(self, key: bytes) -> None:
        """Delete a key if it is there; raise :exc:`LimitExceeded`."""
        self._count(key, 0)
        self._delete(key)

    def _count(self, key: bytes, size: int) -> None:
        if not 0 < len(key) <= MAX_KEY:
            raise LimitExceeded(f"a key of {len(key)} bytes; the limit is {MAX_KEY}")
        self._keys.add(key)
        self._bytes += len(key) + size
        if len(self._keys) > MAX_WRITES:
            raise LimitExceeded(f"a transaction of more than {MAX_WRITES} writes")
        if self._bytes > MAX_TRANSACTION:
            raise LimitExceeded(f"a transaction of more than {MAX_TRANSACTION} bytes")

    @abc.abstractmethod
    def _put(self, key: bytes, value: bytes) -> None: ...

    @abc.abstractmethod
    def _delete(self, key: bytes) -> None: ...


class Engine(abc.ABC):
    """A store. Its coroutines may be called by any number of tasks at once, of one event loop."""

    @abc.abstractmethod
    async def read(self, body: Callable[[Snapshot], T]) -> T:
        """Run ``body`` on a view that holds at least what was committed before the call; return what it returns."""

    @abc.abstractmethod
    async def read_durable(self, body: Callable[[Snapshot], T]) -> T:
        """As :meth:`read`, on a view that holds all that is durable, and nothing that is not."""

    async def scan(self, body: Callable[[Snapshot], T]) -> T:
        """As :meth:`read`, for a body that reads much, or tells of what it sees as it goes.

        It is run once, or from its beginning again if the store cannot keep the moment that is being read.
        """
        return await self.read(body)

    @abc.abstractmethod
    def watch(self, callback: Callable[[], object] | None) -> None:
        """Have ``callback`` called, on the event loop, after each time that more has become durable."""

    async def write(self, body: Callable[[Transaction], T], *, lazy: bool = False) -> T:
        """Run ``body`` and commit what it wrote; return what it returned, once that is durable.

        A ``lazy`` write, and every one of a lazy engine, can return before: the next write that is not lazy, a sync,
        or a short time makes it durable.

        An exception of the body aborts the transaction and is passed on. A conflict is retried. Raises
        :exc:`Conflict` after many of them, :exc:`LimitExceeded`, :exc:`EngineFull`, :exc:`EngineClosed` and
        :exc:`EngineUnavailable`, all with nothing committed, and :exc:`Unknown`.
        """
        pause = _FIRST_PAUSE
        for _ in range(_ATTEMPTS - 1):
            try:
                return await self._attempt(body, lazy)
            except Conflict:
                await asyncio.sleep(pause * random.random())
                pause = min(2 * pause, _LONGEST_PAUSE)
        return await self._attempt(body, lazy)

    @abc.abstractmethod
    async def _attempt(self, body: Callable[[Transaction], T], lazy: bool) -> T:
        """Run ``body`` once as a transaction; raise :exc:`Conflict` if it lost against another one."""

    @property
    def is_lazy(self) -> bool:
        """Whether every write can return before it is durable: :meth:`sync` makes sure then."""
        return False

    @property
    def puts_off(self) -> bool:
        """Whether a lazy write can return before it is durable; if not, no crash takes back what was acknowledged."""
        return self.is_lazy

    @property
    def losses(self) -> int:
        """How often the engine failed to make durable what it had acknowledged, which is lost then."""
        return 0

    async def sync(self) -> None:  # noqa: B027 - there is nothing to do unless an engine is lazy
        """Return when every write that has returned is durable. Raises as :meth:`write` does."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Finish what was accepted, then give everything back. A second call does nothing."""
