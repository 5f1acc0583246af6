"""What survives crashes: the engine, which keeps a record of its commits, and the object store.

The record is the witness of a run: which names, inodes and contents each commit changed, and when. It is read from the
keys that a commit writes, so it does not depend on what the server believes it did.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from fuseclient.data.objects import ObjectMissing
from fuseclient.data.reader import visible
from metaserver import keys, wire
from metaserver.engine.base import Snapshot, Transaction
from metaserver.engine.memory import MemoryEngine, _MemorySnapshot, _Store
from metaserver.namespace import READS, Context
from metaserver.records import Entry, Inode
from metaserver.volumes import Volume
from simulation.history import Commit, Register, Stamp, Value, data_of, links_of, name_of, owner_of
from simulation.loop import Node, VirtualLoop, current_node

T = TypeVar("T")

_KIND = slice(5, 6)
_NUMBER = slice(6, 14)
_NAME_AT = 14


class ObjectsInMemory:
    """The store that all clients share: objects are whole and durable when ``put`` returns."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.objects: dict[int, bytes] = {}

    async def put(self, slice_id: int, data: bytes | bytearray | memoryview) -> None:
        kept = bytes(data)
        await asyncio.sleep(self._rng.uniform(0.001, 0.02))
        self.objects[slice_id] = kept

    async def read(self, slice_id: int, start: int, length: int) -> memoryview:
        await asyncio.sleep(self._rng.uniform(0.001, 0.02))
        if slice_id not in self.objects:
            raise ObjectMissing(f"object {slice_id} is missing")
        return memoryview(self.objects[slice_id])[start : start + length]

    async def delete(self, slice_ids: Iterable[int]) -> None:
        await asyncio.sleep(0.001)
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

    def committed(self, store: _Store, writes: dict[bytes, bytes | None]) -> None:
        """Note what a commit, which has just been applied, changed."""
        self._check_fence(store, writes)
        changes: dict[Register, Value] = {}
        for key, value in writes.items():
            if key[:1] == b"\1":
                changes.update(self._change(store, key, value))
        if changes:
            self.commits.append(Commit(Stamp(self.loop.stamp(), self.loop.now), changes))

    def _check_fence(self, store: _Store, writes: dict[bytes, bytes | None]) -> None:
        """Note commits of a server that was replaced, and those for a session that was ended."""
        if keys.epoch() in writes:
            self.ruler = current_node()
        elif self.ruler is not current_node():
            self.complaints.append(f"a commit at {self.loop.now:.4f} by a server that was replaced")
        for key, value in writes.items():
            session = key[2:18]
            if key[:2] == keys.outcome(b"", 0)[:2] and value is not None and keys.session(session) not in store.values:
                self.complaints.append(f"a commit at {self.loop.now:.4f} for a session that was ended")

    def contents(self) -> dict[int, Value]:
        """Return what is in each small file, removed ones too."""
        return {number: value for (kind, number, _), value in self.last.items() if kind == "data"}

    def _change(self, store: _Store, key: bytes, value: bytes | None) -> Iterator[tuple[Register, Value]]:
        number = int.from_bytes(key[_NUMBER])
        if key[_KIND] == b"e":
            yield name_of(number, key[_NAME_AT:]), Entry.unpack(value).ino if value is not None else 0
        elif key[_KIND] == b"i" and value is not None:
            inode = Inode.unpack(number, value)
            seen: dict[Register, Value] = {owner_of(number): inode.uid, links_of(number): inode.nlink}
            content = self._content(store, int.from_bytes(key[1:5]), inode)
            if content is not None:
                seen[data_of(number)] = content
            for register, now in seen.items():
                if self.last.get(register) != now:
                    self.last[register] = now
                    yield register, now

    def _content(self, store: _Store, volume: int, inode: Inode) -> bytes | None:
        """Return what a small file holds, as a reader would put it together; None for other inodes."""
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


class _WitnessedStore(_Store):
    def __init__(self, witness: Witness) -> None:
        super().__init__()
        self._witness = witness

    def apply(self, writes: dict[bytes, bytes | None]) -> None:
        super().apply(writes)
        self._witness.committed(self, writes)


class WitnessedEngine(MemoryEngine):
    """The memory engine with latency, and a record of its commits. It outlives servers."""

    def __init__(self, witness: Witness, rng: random.Random) -> None:
        super().__init__()
        self._store = _WitnessedStore(witness)
        self._rng = rng
        #: Seconds that a commit takes before and after it is done, at most.
        self.latency_s = 0.01

    async def read(self, body: Callable[[Snapshot], T]) -> T:
        await self._wait()
        result = await super().read(body)
        await self._wait()
        return result

    async def _attempt(self, body: Callable[[Transaction], T], lazy: bool) -> T:
        await self._wait()
        result = await super()._attempt(body, lazy)
        await self._wait()
        return result

    async def _wait(self) -> None:
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
