"""The key space: keys sort as they must, never collide, fit into the limit, and come apart again."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from metaserver import keys, wire
from metaserver.engine.base import MAX_KEY, MAX_VALUE
from metaserver.records import (
    Entry,
    Inode,
    Rule,
    Shard,
    pack_listed,
    pack_rules,
    pack_slices,
    slice_ids,
    unpack_attributes,
    unpack_listed,
    unpack_rules,
    unpack_slices,
)

U64 = st.integers(0, 2**64 - 1)
INO = st.integers(1, 2**48 - 1)
NAME = st.binary(min_size=1, max_size=255)


def _every_key(volume: int, ino: int, name: bytes) -> list[bytes]:
    return [
        keys.inode(volume, ino),
        keys.content(volume, ino),
        keys.xattr(volume, ino, name),
        keys.entry(volume, ino, name),
        keys.listing(volume, ino, 2**63),
        keys.orphan(volume, b"s" * 16, ino),
        keys.next_slice(volume),
        keys.part(volume, ino, 2**32 - 1, 2**64 - 2, 7),
        keys.references(volume, ino),
        keys.unused(volume, ino),
        keys.shard(volume, 15),
        keys.void(volume, ino),
        keys.task(volume, ino),
        keys.event(volume, ino),
        keys.kept_events(volume),
    ]


def test_keys_fit_and_differ() -> None:
    found = [
        key
        for volume, ino, name in itertools.product((1, 2**32 - 1), (1, 2**48 - 1), (b"a", b"\xff" * 255))
        for key in _every_key(volume, ino, name)
    ]
    found += [keys.next_volume(), keys.volume("a" * 63)]
    assert all(0 < len(key) <= MAX_KEY for key in found)
    kinds = {key[:6] for key in _every_key(1, 1, b"a")}
    assert len(kinds) == len(_every_key(1, 1, b"a"))


def test_values_fit() -> None:
    assert wire.MAX_INLINE <= MAX_VALUE
    assert wire.MAX_XATTR_VALUE <= MAX_VALUE


@given(U64, U64)
def test_listing_sorts_by_cookie(one: int, other: int) -> None:
    assert (keys.listing(1, 5, one) < keys.listing(1, 5, other)) == (one < other)


@given(st.tuples(INO, U64), st.tuples(INO, U64))
def test_a_listing_stays_in_its_directory(one: tuple[int, int], other: tuple[int, int]) -> None:
    start, end = keys.listing_from(3, one[0], one[1])
    key = keys.listing(3, *other)
    assert (start <= key < end) == (one[0] == other[0] and other[1] >= one[1])
    assert keys.listing_cookie(key) == other[1]


@given(INO, INO, NAME)
def test_xattrs_stay_with_their_inode(one: int, other: int, name: bytes) -> None:
    start, end = keys.xattrs(3, one)
    key = keys.xattr(3, other, name)
    assert (start <= key < end) == (one == other)
    assert keys.xattr_name(key) == name


@given(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 2), st.integers(0, 2**16 - 1)))
def test_parts_sort_by_chunk_and_version(where: tuple[int, int, int]) -> None:
    key = keys.part(1, 9, *where)
    start, end = keys.parts(1, 9, where[0], where[0])
    assert start <= key < end
    assert keys.part_of(key) == where
    assert not any(start <= keys.part(1, ino, *where) < end for ino in (8, 10))
    assert key < keys.part(1, 9, where[0], where[1] + 1, 0)


@given(st.binary(min_size=16, max_size=16), INO)
def test_orphans_of_a_session(session: bytes, ino: int) -> None:
    key = keys.orphan(1, session, ino)
    start, end = keys.orphans(1, session)
    assert start <= key < end
    assert (keys.orphan_session(key), keys.orphan_ino(key)) == (session, ino)
    start, end = keys.orphans_after(1, session)
    assert not start <= key < end
    start, end = keys.orphans_after(1, b"")
    assert start <= key < end


@given(st.integers(0, 2**44 - 1))
def test_a_slice_is_in_its_block(slice_id: int) -> None:
    key = keys.unused(1, slice_id)
    start, end = keys.all_unused(1)
    assert start <= key < end
    assert 0 <= slice_id - keys.unused_first(key) < keys.BLOCK_SLICES


@given(st.text("abcdefghijklmnopqrstuvwxyz0123456789_.-", min_size=1, max_size=63))
def test_volumes(name: str) -> None:
    start, end = keys.volumes()
    assert start <= keys.volume(name) < end
    assert keys.volume_name(keys.volume(name)) == name
    assert not start <= keys.next_volume() < end


def test_inode_record() -> None:
    inode = Inode(7, 0o100644, 3, 1, 2, 4, 2**60, -5, 2**62, 9, 3, 2**40, 2**59, 11)
    packed = inode.pack()
    assert Inode.unpack(7, packed) == inode
    assert unpack_attributes(7, packed) == inode.attributes()
    assert inode.attributes() == wire.Attributes(7, 0o100644, 3, 1, 2, 4, 2**60, -5, 2**62, 9, 3, 2**40, 2**59)


@given(INO, NAME)
def test_other_records(ino: int, name: bytes) -> None:
    assert unpack_listed(pack_listed(ino, name)) == (ino, name)
    assert Entry.unpack(Entry(ino, 5).pack()) == Entry(ino, 5)
    assert Shard.unpack(Shard(ino, -3, -(2**40)).pack()) == Shard(ino, -3, -(2**40))
    assert unpack_rules(pack_rules([Rule(1, 2), Rule(3, ino)])) == [Rule(1, 2), Rule(3, ino)]
    slices = [wire.Slice(0, 5, ino, 0), wire.Slice(5, 6, 0, 0)]
    assert unpack_slices(pack_slices(slices)) == slices
    assert slice_ids(pack_slices(slices)) == {ino}
