"""Driving the namespace without a server: calls of verbs on an engine, and a check of everything that is stored."""

from __future__ import annotations

import stat
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, TypeVar

import pytest
from local_store import LocalStore

from metaserver import keys, wire
from metaserver.chunks import resolve
from metaserver.deferred import Kind
from metaserver.engine import Engine, Snapshot, open_engine
from metaserver.engine.remote import RemoteEngine
from metaserver.errors import Refused
from metaserver.namespace import READS, WRITES, Context, Volume, create_volume, sweep
from metaserver.records import (
    Entry,
    Inode,
    Shard,
    slice_ids,
    unpack_listed,
    unpack_numbers,
    unpack_rules,
    unpack_slices,
)
from metaserver.wire import ErrorCode, InodeFlag

T = TypeVar("T")

ROOT = wire.ROOT_INO
SESSION = b"session-of-tests"
FILE = stat.S_IFREG | 0o644
DIRECTORY = stat.S_IFDIR | 0o755
SYMLINK = stat.S_IFLNK | 0o777
INLINE_LIMIT = 4096


def new_engine(kind: str, directory: Path) -> Engine:
    """Return a fresh engine: memory, lmdb, or remote, which is what all engines on servers elsewhere are."""
    if kind == "remote":
        return RemoteEngine(LocalStore(), "a store in memory")
    return open_engine("memory://" if kind == "memory" else f"lmdb://{directory}")


class Files:
    """A volume on an engine, and a clock that ticks with every call."""

    #: Whether what an inode says that it stores is what is seen of its content; after a repair it need not be.
    counts_stored = True

    def __init__(self, engine: Engine, volume: Volume) -> None:
        self.engine = engine
        self.volume = volume
        self.now = 1_000

    @classmethod
    async def create(cls, engine: Engine, name: str = "tests") -> Files:
        request = wire.CreateVolume(name, "file:///nowhere", INLINE_LIMIT)
        return cls(engine, await engine.write(lambda txn: create_volume(txn, request, 1_000)))

    async def call(self, request: wire.Request, kind: type[T], session: bytes = SESSION) -> T:
        """Call a request's verb and return its reply, which must be of this kind."""
        self.now += 1
        context = Context(self.volume, session, self.now)
        kind_of = type(request)
        reply: Any
        if kind_of in READS:
            reply = await self.engine.read(lambda snapshot: READS[kind_of](snapshot, context, request))
        else:
            reply = await self.engine.write(lambda txn: WRITES[kind_of](txn, context, request))
        assert isinstance(reply, kind)
        return reply

    async def change(self, request: wire.Request, session: bytes = SESSION) -> wire.Changed:
        return await self.call(request, wire.Changed, session)

    async def refused(self, code: ErrorCode, request: wire.Request) -> None:
        """The request must be refused with this code, and change nothing."""
        before = await self.engine.read(lambda snapshot: _rows(snapshot, self.volume))
        with pytest.raises(Refused) as refusal:
            await self.call(request, object)
        assert refusal.value.code is code, refusal.value
        assert await self.engine.read(lambda snapshot: _rows(snapshot, self.volume)) == before

    async def make(self, name: bytes, mode: int = FILE, parent: int = ROOT, **more: Any) -> int:
        request = wire.MakeNode(parent, name, mode, more.pop("uid", 10), more.pop("gid", 20), **more)
        return (await self.change(request)).attributes[0].ino

    async def mkdir(self, name: bytes, parent: int = ROOT) -> int:
        return await self.make(name, DIRECTORY, parent)

    async def stat(self, ino: int) -> wire.Attributes:
        return (await self.call(wire.GetAttributes(ino), wire.Found)).attributes

    async def find(self, name: bytes, parent: int = ROOT) -> int:
        return (await self.call(wire.Lookup(parent, name), wire.Found)).attributes.ino

    async def fetch(self, ino: int = ROOT, cookie: int = 0, limit: int = 1000, **more: Any) -> list[wire.DirectoryPage]:
        limits = more.pop("data_limit", 0), more.pop("data_budget", 2**62)
        return await self.call(wire.FetchDirectory(ino, cookie, limit, *limits, **more), list)

    async def names(self, ino: int = ROOT) -> list[bytes]:
        return [entry.name for page in await self.fetch(ino) for entry in page.entries]

    async def read(self, ino: int) -> bytes:
        """Return the content of an inline file."""
        size = (await self.stat(ino)).size
        content = await self.call(wire.GetContent(ino, 0, size), wire.Content)
        assert content.inline is not None
        assert not content.slices
        return content.inline.ljust(size, b"\0")

    async def slices(self, count: int) -> list[int]:
        return (await self.call(wire.NewSlices(count), wire.SliceIds)).ids

    async def unused(self) -> list[int]:
        return (await self.call(wire.ListSlices(4096), wire.SliceIds)).ids

    async def sweep(self) -> int:
        """Sweep to the end; return in how many transactions."""
        count = 0
        while await self.engine.write(lambda txn: sweep(txn, self.volume)):
            count += 1
        return count

    async def check(self) -> None:
        """Check that what is stored fits together."""
        await self.engine.read(lambda snapshot: _Check(_rows(snapshot, self.volume), self.counts_stored).run())


def _rows(snapshot: Snapshot, volume: Volume) -> list[tuple[bytes, bytes]]:
    start = keys.inode(volume.id, 0)[:5]
    return snapshot.range(start, start + b"\xff")


def _u64(key: bytes, index: int = 0) -> int:
    return int.from_bytes(key[6 + 8 * index : 14 + 8 * index])


class _Check:
    """The invariants of a volume, from nothing but its rows."""

    def __init__(self, rows: list[tuple[bytes, bytes]], counts_stored: bool) -> None:
        self.counts_stored = counts_stored
        self.rows: dict[bytes, list[tuple[bytes, bytes]]] = defaultdict(list)
        for key, value in rows:
            self.rows[key[5:6]].append((key, value))
        self.inodes = {_u64(key): Inode.unpack(_u64(key), value) for key, value in self.rows[b"i"]}
        self.entries = {(_u64(key), key[14:]): Entry.unpack(value) for key, value in self.rows[b"e"]}
        self.void = {_u64(key): unpack_rules(value) for key, value in self.rows[b"g"]}

    def run(self) -> None:
        self.listing_is_the_entries()
        self.links_are_counted()
        self.directories_are_a_tree()
        self.orphans_are_without_links()
        self.content_belongs_to_inodes()
        self.xattrs_are_flagged()
        self.slices_are_counted()
        self.stored_bytes_are_counted()
        self.counters_are_sums()

    def listing_is_the_entries(self) -> None:
        listed = {}
        for key, value in self.rows[b"l"]:
            ino, name = unpack_listed(value)
            assert 0 < _u64(key, 1) <= self.inodes[_u64(key)].version
            listed[_u64(key), name] = Entry(ino, _u64(key, 1))
        assert listed == self.entries
        assert len(self.rows[b"l"]) == len(self.entries)

    def links_are_counted(self) -> None:
        names = Counter(entry.ino for entry in self.entries.values())
        below = Counter(directory for (directory, _), e in self.entries.items() if self.is_directory(e.ino))
        for inode in self.inodes.values():
            if not self.is_directory(inode.ino):
                assert inode.nlink == names[inode.ino], inode
            elif inode.nlink:
                assert inode.nlink == 2 + below[inode.ino], inode
                assert names[inode.ino] == (inode.ino != ROOT), inode
            else:
                assert names[inode.ino] == below[inode.ino] == 0, inode

    def directories_are_a_tree(self) -> None:
        assert all(directory in self.inodes for directory, _ in self.entries)
        for (directory, _), entry in self.entries.items():
            if self.is_directory(entry.ino):
                assert self.inodes[entry.ino].parent == directory
        for inode in self.inodes.values():
            seen = set()
            while self.is_directory(inode.ino) and inode.nlink and inode.ino != ROOT:
                assert inode.ino not in seen
                seen.add(inode.ino)
                inode = self.inodes[inode.parent]

    def orphans_are_without_links(self) -> None:
        orphans = [keys.orphan_ino(key) for key, _ in self.rows[b"o"]]
        assert sorted(orphans) == sorted(inode.ino for inode in self.inodes.values() if inode.nlink == 0)

    def content_belongs_to_inodes(self) -> None:
        for key, value in self.rows[b"d"]:
            inode = self.inodes[_u64(key)]
            assert 0 < len(value) <= min(inode.size, INLINE_LIMIT)
            assert inode.is_inline or (stat.S_ISLNK(inode.mode) and len(value) == inode.size)

    def xattrs_are_flagged(self) -> None:
        with_xattrs = {_u64(key) for key, _ in self.rows[b"x"]}
        flagged = {inode.ino for inode in self.inodes.values() if inode.flags & InodeFlag.HAS_XATTRS}
        assert flagged <= with_xattrs
        assert with_xattrs - flagged <= self.void.keys() - self.inodes.keys()

    def slices_are_counted(self) -> None:
        used: Counter[int] = Counter()
        chunks: dict[tuple[int, int], set[int]] = defaultdict(set)
        for key, value in self.rows[b"p"]:
            ino, (chunk, version, _) = _u64(key), keys.part_of(key)
            chunks[ino, chunk] |= slice_ids(value[1:])
            is_void = any(chunk >= rule.chunk and version < rule.version for rule in self.void.get(ino, []))
            assert is_void or (ino in self.inodes and not self.inodes[ino].is_inline)
        for ids in chunks.values():
            used.update(ids)
        for _, value in self.rows[b"q"]:
            used.update(unpack_numbers(value[2 + value[1] :]) if value[0] == Kind.RELEASE else ())
        assert {_u64(key): int.from_bytes(value) for key, value in self.rows[b"r"]} == used
        for key, value in self.rows[b"u"]:
            bits = int.from_bytes(value)
            assert bits
            assert not any(bits >> slice_id - keys.unused_first(key) & 1 for slice_id in used)

    def stored_bytes_are_counted(self) -> None:
        stored = Counter({_u64(key): len(value) for key, value in self.rows[b"d"]})
        chunks: dict[tuple[int, int], list[wire.Slice]] = defaultdict(list)
        for key, value in self.rows[b"p"]:
            ino, (chunk, version, _) = _u64(key), keys.part_of(key)
            if not any(chunk >= rule.chunk and version < rule.version for rule in self.void.get(ino, [])):
                chunks[ino, chunk] += unpack_slices(value[1:])
        for (ino, _), slices in chunks.items():
            stored[ino] += sum(s.length for s in resolve(slices))
        for inode in self.inodes.values():
            assert inode.stored == stored[inode.ino] or not self.counts_stored, inode

    def counters_are_sums(self) -> None:
        shards = [Shard.unpack(value) for _, value in self.rows[b"s"]]
        files = [inode for inode in self.inodes.values() if stat.S_ISREG(inode.mode)]
        assert sum(shard.inodes for shard in shards) == len(self.inodes)
        assert sum(shard.total_bytes for shard in shards) == sum(inode.size for inode in files)
        following = {key[-1]: Shard.unpack(value).next for key, value in self.rows[b"s"]}
        assert all(ino // keys.SHARDS < following[keys.shard_of(ino)] for ino in self.inodes)

    def is_directory(self, ino: int) -> bool:
        return stat.S_ISDIR(self.inodes[ino].mode)
