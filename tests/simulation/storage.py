"""What survives crashes: the engine, which keeps a record of its commits, and the object store.

The record is the witness of a run: which names, inodes and contents each commit changed, and when. It is read from the
keys that a commit writes, so it does not depend on what the server believes it did.
"""

from __future__ import annotations

import asyncio
import random
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from fuseclient.data.objects import NoSpace, ObjectMissing, StoreError
from fuseclient.data.reader import visible
from metaserver import keys, wire
from metaserver.engine.base import Snapshot, Transaction
from metaserver.engine.lmdb import INTERVAL_S, LAZY_S
from metaserver.engine.memory import MemoryEngine, Store, _MemorySnapshot
from metaserver.errors import EngineFull, Unknown
from metaserver.namespace import READS, Context
from metaserver.records import Entry, Inode
from metaserver.volumes import Volume
from simulation.history import (
    Commit,
    Register,
    Stamp,
    Value,
    atime_of,
    data_of,
    links_of,
    mode_of,
    name_of,
    owner_of,
    record_of,
    records_in,
    xattr_of,
)
from simulation.loop import Node, VirtualLoop, current_node

T = TypeVar("T")

_KIND = slice(5, 6)
_NUMBER = slice(6, 14)
_NAME_AT = 14


class ObjectsInMemory:
    """The store that all clients share: objects are whole and durable when ``put`` returns.

    While it is ``failing``, what is asked of it fails, though some of it was done; while it is ``full`` it takes no
    more.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.objects: dict[int, bytes] = {}
        self.failing = self.full = False
        self.failures = 0

    async def _access(self) -> None:
        await asyncio.sleep(self._rng.uniform(0.001, 0.02))
        if self.failing:
            self.failures += 1
            raise StoreError("the store fails")

    async def put(self, slice_id: int, data: bytes | bytearray | memoryview) -> None:
        kept = bytes(data)
        if self.full:
            raise NoSpace("the store is full")
        if self._rng.random() < 0.5:
            self.objects[slice_id] = kept
        await self._access()
        self.objects[slice_id] = kept

    async def read(self, slice_id: int, start: int, length: int) -> memoryview:
        await self._access()
        if slice_id not in self.objects:
            raise ObjectMissing(f"object {slice_id} is missing")
        return memoryview(self.objects[slice_id])[start : start + length]

    async def delete(self, slice_ids: Iterable[int]) -> None:
        await self._access()
        for each in slice_ids:
            self.objects.pop(each, None)

    def close(self) -> None:
        pass


@dataclass
class Witness:
    """The commits of a run, in order."""

    loop: VirtualLoop
    objects: ObjectsInMemory
    commits: list[Commit] = field(default_factory=list)
    last: dict[Register, Value] = field(default_factory=dict)
    #: The server that took the engine over last.
    ruler: Node | None = None
    complaints: list[str] = field(default_factory=list)
    #: Logs, and the records that each has.
    logs: dict[int, Counter[bytes]] = field(default_factory=dict)
    #: Called with each commit of what somebody can see.
    on_commit: Callable[[Commit], None] = lambda commit: None

    def committed(self, store: Store, writes: dict[bytes, bytes | None]) -> int | None:
        """Note what a commit, which has just been applied, changed; return its number if that was anything."""
        self._check_fence(store, writes)
        return self._note(store, writes, _session_of(writes), None)

    def undone(self, store: Store, writes: dict[bytes, bytes | None], commits: Iterable[int]) -> None:
        """A crash has put these values back, and so taken back these commits."""
        self._note(store, writes, b"", tuple(commits))

    def _note(
        self, store: Store, writes: dict[bytes, bytes | None], session: bytes, undoes: tuple[int, ...] | None
    ) -> int | None:
        changes: dict[Register, Value] = {}
        for key, value in writes.items():
            if key[:1] == b"\1":
                changes.update(self._change(store, key, value))
        if not changes:
            return None
        self.commits.append(Commit(Stamp(self.loop.stamp(), self.loop.now), changes, session, undoes))
        self.on_commit(self.commits[-1])
        return len(self.commits) - 1

    def _check_fence(self, store: Store, writes: dict[bytes, bytes | None]) -> None:
        """Note commits of a server that was replaced, and those for a session that was ended."""
        if keys.epoch() in writes:
            self.ruler = current_node()
        elif self.ruler is not current_node():
            self.complaints.append(f"a commit at {self.loop.now:.4f} by a server that was replaced")
        session = _session_of(writes)
        if session and keys.session(session) not in store.values:
            self.complaints.append(f"a commit at {self.loop.now:.4f} for a session that was ended")

    def contents(self) -> dict[int, Value]:
        """Return what is in each small file, removed ones too."""
        return {number: value for (kind, number, _), value in self.last.items() if kind == "data"}

    def _change(self, store: Store, key: bytes, value: bytes | None) -> Iterator[tuple[Register, Value]]:
        number = int.from_bytes(key[_NUMBER])
        if key[_KIND] == b"e":
            yield name_of(number, key[_NAME_AT:]), Entry.unpack(value).ino if value is not None else 0
        elif key[_KIND] == b"x" and keys.inode(int.from_bytes(key[1:5]), number) in store.values:
            yield xattr_of(number, key[_NAME_AT:]), value or b""
        elif key[_KIND] == b"i" and value is not None:
            inode = Inode.unpack(number, value)
            seen: dict[Register, Value] = {
                owner_of(number): inode.uid,
                mode_of(number): stat.S_IMODE(inode.mode),
                atime_of(number): inode.atime_ns,
                links_of(number): inode.nlink,
            }
            content = self._content(store, int.from_bytes(key[1:5]), inode)
            if content is not None and number in self.logs:
                seen.update(self._records(number, content))
            elif content is not None:
                seen[data_of(number)] = content
            for register, now in seen.items():
                if self.last.get(register) != now:
                    self.last[register] = now
                    yield register, now

    def _records(self, log: int, content: bytes) -> dict[Register, Value]:
        """Return what a log has of each record that it has, or had before."""
        before, now = self.logs[log], records_in(content)
        self.logs[log] = now
        return {record_of(log, each): now[each] for each in before | now}

    def _content(self, store: Store, volume: int, inode: Inode) -> bytes | None:
        """Return what a small file holds, as a reader would put it together; None for what has no content."""
        if stat.S_ISLNK(inode.mode):
            return store.values[keys.content(volume, inode.ino)]
        if inode.mode >> 12 != 0o10 or inode.size > wire.MAX_INLINE:
            return None
        context = Context(Volume(volume, "", 0, ""), b"", 0)
        found = READS[wire.GetContent](_MemorySnapshot(store), context, wire.GetContent(inode.ino, 0, wire.MAX_INLINE))
        if found.inline is not None:
            return bytes(found.inline.ljust(inode.size, b"\0"))
        buffer = bytearray(inode.size)
        for piece in visible(found.slices, 0, inode.size):
            part = self.objects.objects.get(piece.slice_id, b"")[piece.start : piece.start + piece.length]
            buffer[piece.offset : piece.offset + len(part)] = part
        return bytes(buffer)


def _session_of(writes: dict[bytes, bytes | None]) -> bytes:
    """Return the session whose change a transaction is, if it is one."""
    kind = keys.outcome(b"", 0)[:2]
    return next((key[2:18] for key, value in writes.items() if key[:2] == kind and value is not None), b"")


class _Held(NamedTuple):
    """A commit that a crash may take back: its place and time, its number, and what was there before."""

    serial: int
    time: float
    number: int | None
    before: dict[bytes, bytes | None]


class _WitnessedStore(Store):
    def __init__(self, witness: Witness) -> None:
        super().__init__()
        self._witness = witness
        self.held: list[_Held] = []
        self.serial = 0

    def apply(self, writes: dict[bytes, bytes | None]) -> None:
        before = {key: self.values.get(key) for key in writes}
        super().apply(writes)
        number = self._witness.committed(self, writes)
        self.serial += 1
        self.held.append(_Held(self.serial, self._witness.loop.now, number, before))

    def settle(self, serial: int) -> None:
        """What was committed up to this is durable."""
        self.held = [held for held in self.held if held.serial > serial]

    def lose(self, count: int) -> None:
        """Take the last commits back."""
        values: dict[bytes, bytes | None] = {}
        for held in reversed(self.held[len(self.held) - count :]):
            values.update(held.before)
        lost = [held.number for held in self.held[len(self.held) - count :] if held.number is not None]
        super().apply(values)
        self._witness.undone(self, values, lost)
        self.held.clear()


class WitnessedEngine(MemoryEngine):
    """The memory engine with latency, and a record of its commits. It outlives servers.

    A crash takes back what was written lazily and is not durable yet, as one of LMDB's process would. ``lazy``: every
    write is. It can be ``full``, and ``doubtful``: some commits, made or not, have an unknown outcome.
    """

    def __init__(self, witness: Witness, rng: random.Random, *, lazy: bool) -> None:
        super().__init__()
        self._store: _WitnessedStore = _WitnessedStore(witness)
        self._rng = rng
        self._loop = witness.loop
        self._lazy = lazy
        self.full = self.doubtful = False
        #: No access ends before this time.
        self.away_until = 0.0
        self._losses = 0
        #: How often it was full, an outcome was unknown, and a commit was lost.
        self.counts: Counter[str] = Counter()
        #: Seconds that a commit takes before and after it is done, at most.
        self.latency_s = 0.01

    @property
    def is_lazy(self) -> bool:
        return self._lazy

    @property
    def puts_off(self) -> bool:
        return True

    @property
    def losses(self) -> int:
        return self._losses

    def lose(self) -> None:
        """Fail to make durable what was acknowledged, while servers run."""
        if self._store.held:
            self._losses += 1
            self._store.lose(len(self._store.held))

    async def sync(self) -> None:
        serial = self._store.serial
        await self._wait()
        self._store.settle(serial)

    def crash(self) -> None:
        """Lose some of what is not durable: the last commits."""
        since = self._loop.now - (INTERVAL_S if self._lazy else LAZY_S)
        count = self._rng.randint(0, sum(held.time > since for held in self._store.held))
        if count:
            self.counts["lost commits"] += count
            self._store.lose(count)

    async def read(self, body: Callable[[Snapshot], T]) -> T:
        await self._wait()
        result = await super().read(body)
        await self._wait()
        return result

    async def _attempt(self, body: Callable[[Transaction], T], lazy: bool) -> T:
        await self._wait()
        doubt = self.doubtful and self._rng.random() < 0.3
        if doubt and self._rng.random() < 0.5:
            self._doubt()
        result = await super()._attempt(self._unless_full(body) if self.full else body, lazy)
        if not lazy and not self._lazy:
            self._store.settle(self._store.serial)
        if doubt:
            self._doubt()
        await self._wait()
        return result

    def _doubt(self) -> None:
        self.counts["unknown outcomes"] += 1
        raise Unknown("the outcome of a commit is not known")

    def _unless_full(self, body: Callable[[Transaction], T]) -> Callable[[Transaction], T]:
        def wrapped(txn: Transaction) -> T:
            result = body(txn)
            writes = txn.writes  # type: ignore[attr-defined]
            if sum(len(value or b"") - len(self._store.values.get(key, b"")) for key, value in writes.items()) > 0:
                self.counts["full"] += 1
                raise EngineFull("the engine is full")
            return result

        return wrapped

    async def _wait(self) -> None:
        await asyncio.sleep(max(0.0, self.away_until - self._loop.now))
        if self._rng.random() < 0.5:
            await asyncio.sleep(self._rng.uniform(0, self.latency_s))

    def entries(self, volume: int) -> dict[int, dict[bytes, int]]:
        """Return every directory's entries, from the engine's own keys."""
        found: dict[int, dict[bytes, int]] = {}
        for key in self._store.range(*keys._kind_range(volume, b"e")):
            names = found.setdefault(int.from_bytes(key[_NUMBER]), {})
            names[key[_NAME_AT:]] = Entry.unpack(self._store.values[key]).ino
        return found

    def inodes(self, volume: int) -> dict[int, Inode]:
        """Return every inode."""
        found = {}
        for key in self._store.range(*keys._kind_range(volume, b"i")):
            number = int.from_bytes(key[_NUMBER])
            found[number] = Inode.unpack(number, self._store.values[key])
        return found
