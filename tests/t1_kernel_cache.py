"""Filling and emptying the kernel cache, seen through what the BPF programs answer."""

from __future__ import annotations

import multiprocessing
import random
import struct
import time
from array import array
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from typing import Any

import bpf_map
import kernel
import pytest
from kernel import DIRECTORY, REGULAR, SYMLINK, Kernel, MakeKernel, attributes

from fuseclient import kernel_cache, native
from fuseclient._native import ffi, lib
from fuseclient.channel import acceleration
from fuseclient.config import MapFds
from fuseclient.kernel_cache import Cache, KernelCache, NoKernelCache
from metaserver.wire import Attributes, DirectoryEntry

ROOT = 1
PAGE = 4096


@pytest.fixture(scope="module")
def needs_bpf() -> None:
    kernel.require_bpf()


@pytest.fixture
def make(needs_bpf: None) -> Iterator[MakeKernel]:
    yield from kernel.making()


@pytest.fixture
def bpf(make: MakeKernel) -> Kernel:
    return make()


def file_entry(ino: int, data: bytes | None, size: int | None = None) -> DirectoryEntry:
    length = size if size is not None else len(data or b"")
    return DirectoryEntry(b"file%d" % ino, ino, attributes(ino, REGULAR, length), data)


def content(ino: int, generation: int, size: int) -> bytes:
    """Return bytes that no other inode or generation has, at any page."""
    word = struct.pack("<QQ", ino, generation)
    return (word * (size // len(word) + 1))[:size]


def outcome(bpf: Kernel, request: kernel.Request) -> str:
    return bpf.ask(request).outcome


def read_all(bpf: Kernel, ino: int) -> bytes | None:
    """Return what BPF reads of a file, or None for a miss."""
    answer = bpf.ask(kernel.read(ino, 0, 131072))
    return answer.payload if answer.outcome == "ANSWERED" else None


# Putting and dropping


def test_an_empty_cache_misses(bpf: Kernel) -> None:
    assert outcome(bpf, kernel.lookup(ROOT, b"file")) == "MISS_NAME"
    assert outcome(bpf, kernel.getattr_(ROOT)) == "MISS_INODE"


def test_entries_put_together_are_answered(bpf: Kernel) -> None:
    entries = [file_entry(ino, content(ino, 0, ino)) for ino in range(2, 602)]
    assert len(entries) > 2 * lib.BPFUSE_BATCH
    bpf.cache.put(ROOT, entries)
    for each in entries:
        assert outcome(bpf, kernel.lookup(ROOT, each.name)) == "ANSWERED"
    assert sum(read_all(bpf, each.attributes.ino) == each.data for each in entries) >= 32


def test_putting_nothing_does_nothing(bpf: Kernel) -> None:
    bpf.cache.put(ROOT, [])
    assert native.count_entries(bpf.fds) == (0, 0)


def test_a_dropped_name_is_missed_and_its_inode_stays(bpf: Kernel) -> None:
    bpf.cache.put(ROOT, [file_entry(2, b"data")])
    bpf.cache.drop_name(ROOT, b"file2")
    bpf.cache.drop_name(ROOT, b"never there")
    assert outcome(bpf, kernel.lookup(ROOT, b"file2")) == "MISS_NAME"
    assert read_all(bpf, 2) == b"data"


def test_a_dropped_inode_is_missed_by_every_name(bpf: Kernel) -> None:
    bpf.cache.put(ROOT, [file_entry(2, b"data")])
    bpf.cache.drop_inode(2)
    bpf.cache.drop_inode(3)
    assert outcome(bpf, kernel.lookup(ROOT, b"file2")) == "MISS_INODE"
    assert read_all(bpf, 2) is None


def test_it_says_whether_all_of_some_inodes_are_there(bpf: Kernel) -> None:
    marked = array("Q", [2, 3 | 1 << 62, 4])
    assert bpf.cache.has_all(array("Q"), content=True)
    assert not bpf.cache.has_all(marked, content=False)
    large = DirectoryEntry(b"large", 4, attributes(4, REGULAR, 1 << 20), None)
    bpf.cache.put(ROOT, [file_entry(2, b"data"), file_entry(3, None, 7), large])
    assert bpf.cache.has_all(marked, content=False)
    assert not bpf.cache.has_all(marked, content=True)
    bpf.cache.put_inode(attributes(3, REGULAR, 7), b"content")
    assert bpf.cache.has_all(marked, content=True)
    bpf.cache.drop_inode(2)
    assert not bpf.cache.has_all(marked, content=False)
    assert bpf.cache.has_all(marked[1:], content=True)
    bpf.cache.bump_epoch()
    assert not bpf.cache.has_all(marked[1:], content=False)


def test_it_says_which_of_some_inodes_are_not_there(bpf: Kernel) -> None:
    bpf.cache.put(ROOT, [file_entry(2, b"data"), file_entry(3, None, 7)])
    assert bpf.cache.missing(array("Q", [4, 2, 3, 5])) == array("Q", [4, 5])
    assert bpf.cache.missing(array("Q")) == array("Q")
    bpf.cache.bump_epoch()
    assert bpf.cache.missing(array("Q", [2])) == array("Q", [2])


def test_a_name_changes_from_absent_to_present_and_back(bpf: Kernel) -> None:
    bpf.cache.put_inode(attributes(2))
    bpf.cache.put_absent(ROOT, b"name")
    assert outcome(bpf, kernel.lookup(ROOT, b"name")) == "ANSWERED_ABSENT"
    bpf.cache.put_name(ROOT, b"name", 2)
    assert outcome(bpf, kernel.lookup(ROOT, b"name")) == "ANSWERED"
    bpf.cache.put_absent(ROOT, b"name")
    assert outcome(bpf, kernel.lookup(ROOT, b"name")) == "ANSWERED_ABSENT"


def test_an_inode_put_anew_replaces_attributes_and_content(bpf: Kernel) -> None:
    bpf.cache.put_inode(attributes(2, size=3), b"one")
    bpf.cache.put_inode(attributes(2, size=5), b"three")
    assert read_all(bpf, 2) == b"three"
    bpf.cache.put_inode(attributes(2, size=5, version=6))
    assert outcome(bpf, kernel.read(2, 0, 10)) == "MISS_DATA"
    assert outcome(bpf, kernel.getattr_(2)) == "ANSWERED"


def test_attributes_alone_leave_the_content_of_the_same_version(bpf: Kernel) -> None:
    data = content(2, 1, 5000)
    bpf.cache.put_inode(attributes(2, size=5000), data)
    bpf.cache.put_inode(attributes(2, size=5000))
    bpf.cache.put(ROOT, [file_entry(2, None, 5000)])
    assert read_all(bpf, 2) == data
    for changed in (attributes(2, size=5000, version=6), attributes(2, size=4999), attributes(2, mode=0, size=5000)):
        bpf.cache.put_inode(changed)
        assert read_all(bpf, 2) is None
        bpf.cache.put_inode(attributes(2, size=5000), data)
    bpf.cache.drop_inode(2)
    bpf.cache.put_inode(attributes(2, size=5000))
    assert read_all(bpf, 2) is None
    bpf.cache.put_inode(attributes(2, size=5000), data)
    bpf.cache.bump_epoch()
    bpf.cache.put_inode(attributes(2, size=5000))
    assert read_all(bpf, 2) is None


def test_a_symlinks_target_is_content(bpf: Kernel) -> None:
    bpf.cache.put_inode(attributes(2, SYMLINK, 4095), b"t" * 4095)
    assert bpf.ask(kernel.readlink(2)).payload == b"t" * 4095


@pytest.mark.parametrize(
    ("mode", "size", "data"),
    [
        (REGULAR, 65537, bytes(65537)),
        (REGULAR, 10, b"too short"),
        (REGULAR, 2**32 - 1, None),
        (SYMLINK, 4096, b"t" * 4096),
        (SYMLINK, 0, b""),
    ],
)
def test_content_that_cannot_be_served_is_left_out(bpf: Kernel, mode: int, size: int, data: bytes | None) -> None:
    bpf.cache.put_inode(attributes(2, mode, size), data)
    request = kernel.readlink(2) if mode == SYMLINK else kernel.read(2, 0, 131072)
    assert outcome(bpf, request) == "MISS_DATA"


def test_content_of_what_is_not_a_file_is_left_out(bpf: Kernel) -> None:
    bpf.cache.put_inode(attributes(2, DIRECTORY, 4), b"what")
    assert bpf.cache.figures()["maps"]["pages"]["entries"] == 0


def test_times_before_1970_keep_their_nanoseconds_positive(bpf: Kernel) -> None:
    given = attributes(2)
    times = {"atime_ns": -1, "mtime_ns": -(10**9), "ctime_ns": -(2**63)}
    kept = {name: getattr(given, name) for name in given.__struct_fields__}
    bpf.cache.put_inode(Attributes(**{**kept, **times}))
    reply = bpf.ask(kernel.getattr_(2)).payload
    seconds = struct.unpack_from("<3q", reply, 16 + 24)
    nanoseconds = struct.unpack_from("<3I", reply, 16 + 48)
    assert [s * 10**9 + ns for s, ns in zip(seconds, nanoseconds, strict=True)] == list(times.values())
    assert all(ns < 10**9 for ns in nanoseconds)


def test_hard_links_in_one_batch(bpf: Kernel) -> None:
    one = file_entry(2, b"data")
    bpf.cache.put(ROOT, [one, DirectoryEntry(b"other", 9, one.attributes, b"data")])
    assert outcome(bpf, kernel.lookup(ROOT, b"file2")) == outcome(bpf, kernel.lookup(ROOT, b"other")) == "ANSWERED"
    assert read_all(bpf, 2) == b"data"


def test_a_new_epoch_forgets_everything_and_takes_new_values(bpf: Kernel) -> None:
    bpf.cache.put(ROOT, [file_entry(2, b"old")])
    bpf.cache.bump_epoch()
    assert outcome(bpf, kernel.lookup(ROOT, b"file2")) == "MISS_EPOCH"
    bpf.cache.put(ROOT, [file_entry(2, b"new")])
    assert outcome(bpf, kernel.lookup(ROOT, b"file2")) == "ANSWERED"
    assert read_all(bpf, 2) == b"new"


def test_the_kernels_time_to_live_is_set_at_start(bpf: Kernel) -> None:
    assert bpf.control.kernel_ttl_max == 2**64 - 1
    KernelCache(bpf.fds, 1.5).close()
    assert bpf.control.kernel_ttl_max == 1_500_000_000


# The ring of pages


def check_ring(bpf: Kernel, put: dict[int, bytes]) -> int:
    """Check that every file reads as it was put or is missed; return how many are answered."""
    answered = 0
    for ino, data in put.items():
        seen = read_all(bpf, ino)
        assert seen in (None, data), f"foreign bytes in file {ino}"
        answered += seen is not None
    return answered


@pytest.mark.parametrize("seed", range(4))
def test_the_ring_never_shows_foreign_bytes(make: MakeKernel, seed: int) -> None:
    bpf, chance = make(page_count=37), random.Random(seed)
    put: dict[int, bytes] = {}
    for generation in range(150):
        batch = []
        for ino in chance.sample(range(2, 40), chance.randint(1, 6)):
            size = chance.choice([0, 1, PAGE - 1, PAGE, PAGE + 1, chance.randint(1, 65536)])
            put[ino] = content(ino, generation, size)
            batch.append(file_entry(ino, put[ino]))
        bpf.cache.put(ROOT, batch)
        for ino in chance.sample(sorted(put), min(3, len(put))):
            bpf.cache.put_inode(attributes(ino, size=len(put[ino])))
        if generation % 10 == 3:
            bpf.cache.drop_inode(chance.choice(list(put)))
        if generation % 50 == 30:
            bpf.cache.bump_epoch()
        answered = check_ring(bpf, put)
        assert answered > 0 or generation % 50 == 30 or generation % 10 == 3
    filling = bpf.cache.figures()["filling"]
    assert filling["overtaken"] > 100
    assert filling["put_failures"] == filling["forced_epochs"] == 0


def test_the_last_files_that_fit_are_kept(make: MakeKernel) -> None:
    bpf = make(page_count=16)
    for ino in range(2, 102):
        bpf.cache.put_inode(attributes(ino, size=PAGE), content(ino, 0, PAGE))
    kept = [ino for ino in range(2, 102) if read_all(bpf, ino) is not None]
    assert kept == list(range(102 - 16, 102))
    assert bpf.cache.figures()["maps"]["pages"]["entries"] == 16


def test_a_batch_larger_than_the_ring(make: MakeKernel) -> None:
    bpf = make(page_count=16)
    put = {ino: content(ino, 0, PAGE * (1 + ino % 3)) for ino in range(2, 102)}
    bpf.cache.put(ROOT, [file_entry(ino, data) for ino, data in put.items()])
    assert check_ring(bpf, put) > 0


def test_a_file_larger_than_the_ring_is_left_out(make: MakeKernel) -> None:
    bpf = make(page_count=15)
    bpf.cache.put_inode(attributes(2, size=65536), bytes(65536))
    assert outcome(bpf, kernel.read(2, 0, 10)) == "MISS_DATA"
    bpf.cache.put_inode(attributes(2, size=15 * PAGE), bytes(15 * PAGE))
    assert read_all(bpf, 2) == bytes(15 * PAGE)


def test_the_next_worker_goes_on_with_the_same_maps(make: MakeKernel) -> None:
    bpf = make(page_count=16)
    put = {ino: content(ino, 0, PAGE) for ino in range(2, 14)}
    bpf.cache.put(ROOT, [file_entry(ino, data) for ino, data in put.items()])
    bpf.cache.close()
    bpf.cache = KernelCache(bpf.fds)
    assert check_ring(bpf, put) == 12
    for ino in range(100, 140):
        put[ino] = content(ino, 1, 2 * PAGE)
        bpf.cache.put_inode(attributes(ino, size=2 * PAGE), put[ino])
        check_ring(bpf, put)
    assert bpf.cache.figures()["filling"]["overtaken"] == 12 + 40 - 8


def test_versions_rise_over_workers(bpf: Kernel) -> None:
    value = ffi.new("struct bpfuse_inode_value *")
    versions = []
    for _ in range(3):
        bpf.cache.put_inode(attributes(2))
        bpf.cache.put_inode(attributes(2))
        bpf_map.lookup(bpf.fds.inodes, 2, value)
        versions.append(value.version)
        value.version += 10**12  # as if the clock had stood still since
        bpf_map.update(bpf.fds.inodes, 2, value)
        bpf.cache.close()
        bpf.cache = KernelCache(bpf.fds)
    assert versions[0] + 10**12 < versions[1]
    assert versions[1] + 10**12 < versions[2]


# Full maps and failures


def went_wrong(cache: Cache) -> dict[str, int]:
    filling = cache.figures()["filling"]
    return {name: filling[name] for name in ("put_failures", "forced_epochs")}


def test_a_full_map_forgets_and_never_fails(make: MakeKernel) -> None:
    bpf = make(capacity=512)
    for start in range(2, 10002, 200):
        bpf.cache.put(ROOT, [file_entry(ino, None) for ino in range(start, start + 200)])
    counts = native.count_entries(bpf.fds)
    assert 0 < counts.names <= 512
    assert 0 < counts.inodes <= 512
    assert any(outcome(bpf, kernel.lookup(ROOT, b"file%d" % ino)) == "ANSWERED" for ino in range(9802, 10002))
    assert went_wrong(bpf.cache) == {"put_failures": 0, "forced_epochs": 0}


def tick() -> int:
    """Return the time in units of the map ``uses``."""
    return int(time.clock_gettime_ns(time.CLOCK_BOOTTIME) >> lib.BPFUSE_USE_SHIFT)


def next_tick() -> None:
    now = tick()
    while tick() == now:
        pass


def directory_of(parent: int, count: int) -> list[DirectoryEntry]:
    first = parent * 1000
    return [DirectoryEntry(b"%d" % n, n + 1, attributes(first + n), None) for n in range(count)]


def is_there(bpf: Kernel, parent: int, count: int) -> set[bool]:
    """Return whether lookups in a directory of :func:`directory_of` are answered: both if it is there in part."""
    return {outcome(bpf, kernel.lookup(parent, b"%d" % n)) == "ANSWERED" for n in range(count)}


def test_the_coldest_directories_are_given_up_whole(make: MakeKernel) -> None:
    bpf = make(capacity=1024)
    for parent in range(2, 22):
        bpf.cache.put(parent, directory_of(parent, 50))
    bpf.cache.put_absent(2, b"absent")
    assert bpf.cache.take_evicted() == (array("Q"), [], True)
    next_tick()
    asked = (kernel.lookup(2, b"absent"), kernel.getattr_(3001), kernel.open_(4049), kernel.getxattr(5007, b"user.a"))
    for request in asked:
        assert outcome(bpf, request).startswith("ANSWERED")
    next_tick()
    for parent in range(22, 30):
        bpf.cache.put(parent, directory_of(parent, 50))
    there = {parent: is_there(bpf, parent, 50) for parent in range(2, 30)}
    assert all(len(answers) == 1 for answers in there.values())
    kept = [parent for parent, answers in there.items() if answers == {True}]
    assert kept[:4] == [2, 3, 4, 5]
    assert kept[4:] == list(range(30 - len(kept) + 4, 30))
    evicted = bpf.cache.take_evicted()
    assert evicted.directories == [parent for parent in there if parent not in kept]
    assert sorted(evicted.inodes) == [parent * 1000 + n for parent in evicted.directories for n in range(50)]
    assert evicted.all_known
    filling = bpf.cache.figures()["filling"]
    assert filling["evicted_groups"] == len(evicted.directories)
    assert filling["evicted_entries"] == 2 * len(evicted.inodes)
    assert went_wrong(bpf.cache) == {"put_failures": 0, "forced_epochs": 0}


def test_a_directory_that_is_larger_than_the_cache_leaves_its_oldest_parts(make: MakeKernel) -> None:
    bpf = make(capacity=1024)
    for start in range(0, 5000, 250):
        bpf.cache.put(2, [file_entry(ino, None) for ino in range(start + 10, start + 260)])
    there = [outcome(bpf, kernel.lookup(2, b"file%d" % ino)) == "ANSWERED" for ino in range(10, 5010)]
    assert not any(there[:3976])
    assert all(there[-700:])
    assert bpf.cache.take_evicted().directories == []
    assert went_wrong(bpf.cache) == {"put_failures": 0, "forced_epochs": 0}


def test_what_is_put_anew_goes_with_its_new_group(make: MakeKernel) -> None:
    """The same names again and again do not pile up; a value is given up with the group that it was put with last."""
    bpf = make(capacity=256)
    for _ in range(50):
        bpf.cache.put(2, directory_of(2, 100))
    assert lib.bpfuse_cache_members(bpf.cache._handle()) <= 3 * 256 + lib.BPFUSE_BATCH
    for ino in range(10_000, 11_000):  # names that come and go
        bpf.cache.put(3, [file_entry(ino, None)])
        bpf.cache.drop_name(3, b"file%d" % ino)
        bpf.cache.drop_inode(ino)
    assert lib.bpfuse_cache_members(bpf.cache._handle()) <= 3 * 256 + lib.BPFUSE_BATCH
    bpf.cache.put(2, directory_of(2, 100))
    assert is_there(bpf, 2, 100) == {True}
    assert native.count_entries(bpf.fds) == (100, 100)


def test_inodes_without_names_are_given_up_too(make: MakeKernel) -> None:
    bpf = make(capacity=256)
    for ino in range(2, 2000):
        bpf.cache.put_inode(attributes(ino))
        assert outcome(bpf, kernel.getattr_(ino)) == "ANSWERED"
    assert went_wrong(bpf.cache) == {"put_failures": 0, "forced_epochs": 0}
    assert 1990 - len(bpf.cache.take_evicted().inodes) <= 256


def test_the_next_worker_gives_up_what_this_one_put(make: MakeKernel) -> None:
    bpf = make(capacity=1024)
    for parent in range(2, 20):
        bpf.cache.put(parent, directory_of(parent, 50))
    bpf.cache.put_inode(attributes(5))
    bpf.cache.close()
    bpf.cache = KernelCache(bpf.fds)
    next_tick()
    assert outcome(bpf, kernel.lookup(3, b"7")) == "ANSWERED"
    next_tick()
    for parent in range(30, 40):
        bpf.cache.put(parent, directory_of(parent, 50))
    assert is_there(bpf, 3, 50) == {True}
    assert all(is_there(bpf, parent, 50) == {True} for parent in range(30, 40))
    assert went_wrong(bpf.cache) == {"put_failures": 0, "forced_epochs": 0}
    for parent in range(40, 60):
        bpf.cache.put(parent, directory_of(parent, 50))
    gone = bpf.cache.take_evicted()
    assert {*range(2, 20)} <= {*gone.directories}
    assert outcome(bpf, kernel.getattr_(5)) == "MISS_INODE"


@pytest.mark.parametrize("mebibytes", [1, 7, 16])
def test_the_maps_take_what_the_user_gives_them(make: MakeKernel, mebibytes: int) -> None:
    sizes = acceleration.map_sizes(mebibytes << 20)
    bpf = make(capacity=sizes.entries, page_count=sizes.pages)
    taken = {name: native.map_bytes(getattr(bpf.fds, name)) for name in ("names", "inodes", "uses", "xattrs", "pages")}
    assert 0.9 < sum(taken.values()) / (mebibytes << 20) <= 1
    assert (taken["names"] + taken["inodes"]) / sizes.entries <= 300
    assert taken["uses"] <= 4 * sizes.entries + 2 * PAGE


def test_an_entry_takes_at_most_300_bytes_at_any_size() -> None:
    for cache_bytes in (1 << 20, 100_000_000, 1 << 28, 777 << 20, 1 << 33):
        sizes = acceleration.map_sizes(cache_bytes)
        taken = acceleration.entries_bytes(sizes.entries) + 4096 * sizes.pages
        assert 0.95 < taken / cache_bytes <= 1
        power = 1 << (sizes.entries - 1).bit_length()
        assert 260 + 32 * power / sizes.entries <= 300


def test_a_value_that_the_kernel_refuses_is_not_cached(bpf: Kernel) -> None:
    small = bpf_map.create_hash(ffi.sizeof("struct bpfuse_name_key"), ffi.sizeof("struct bpfuse_name_value"), 4)
    cache = KernelCache(MapFds(**{**_fields(bpf.fds), "names": small, "count_program": -1}))
    cache.put(ROOT, [file_entry(ino, None) for ino in range(2, 12)])
    figures = cache.figures()
    assert went_wrong(cache) == {"put_failures": 6, "forced_epochs": 0}
    assert figures["maps"]["names"]["entries"] == 4
    assert figures["maps"]["inodes"]["entries"] == 10
    cache.close()


def test_when_a_drop_fails_everything_is_forgotten(bpf: Kernel) -> None:
    bpf.cache.put(ROOT, [file_entry(2, b"data")])
    before = bpf.cache.epoch
    bpf_map.freeze(bpf.fds.inodes)
    bpf.cache.drop_inode(2)
    assert bpf.cache.epoch == before + 1
    assert outcome(bpf, kernel.read(2, 0, 10)) == "MISS_EPOCH"
    bpf.cache.put_inode(attributes(2, size=3), b"new")
    assert outcome(bpf, kernel.read(2, 0, 10)) == "MISS_EPOCH"
    assert went_wrong(bpf.cache) == {"put_failures": 1, "forced_epochs": 2}


def _fields(fds: MapFds) -> dict[str, Any]:
    return {name: getattr(fds, name) for name in fds.__struct_fields__}


def test_maps_that_cannot_be_mapped_are_refused(bpf: Kernel) -> None:
    with pytest.raises(native.NativeError, match="cannot map the kernel cache"):
        KernelCache(MapFds(**{**_fields(bpf.fds), "pages": bpf.fds.names}))


def test_a_closed_cache_raises(bpf: Kernel) -> None:
    bpf.cache.close()
    bpf.cache.close()
    with pytest.raises(ValueError, match="closed"):
        bpf.cache.put(ROOT, [file_entry(2, b"data")])
    with pytest.raises(ValueError, match="closed"):
        bpf.cache.renew(1)


def test_a_closed_bpf_object_raises(bpf: Kernel) -> None:
    bpf.bpf.close()
    with pytest.raises(ValueError, match="closed"):
        bpf.bpf.map_fd("names")


def test_an_object_that_is_not_there_names_itself_and_the_remedy() -> None:
    with pytest.raises(native.NativeError, match=r"BPF object.*No such file") as caught:
        native.Bpf("/nonexistent.o", name_capacity=1, inode_capacity=1, page_count=1, ring_entries=1)
    assert "make setup" in caught.value.hint
    assert "\n" not in str(caught.value)


def test_figures(bpf: Kernel) -> None:
    bpf.cache.put(ROOT, [file_entry(ino, bytes(ino)) for ino in range(2, 12)])
    bpf.ask(kernel.lookup(ROOT, b"file2"))
    bpf.ask(kernel.lookup(ROOT, b"unknown"))
    figures = bpf.cache.figures()
    assert figures["counters"] == {"LOOKUP": {"answered": 1, "miss_name": 1}}
    assert {name: each["entries"] for name, each in figures["maps"].items()} == {"names": 10, "inodes": 10, "pages": 10}
    assert figures["maps"]["pages"]["bytes"] >= 64 * PAGE
    assert figures["epoch"] == bpf.cache.epoch
    assert figures["deadline_ns"] == bpf.control.deadline
    walked = native.count_entries(MapFds(**{**_fields(bpf.fds), "count_program": -1}))
    assert walked == native.count_entries(bpf.fds) == (10, 10)


def test_without_acceleration_it_is_kept_which_inodes_have_no_xattrs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "_BARE", 3)
    cache: Cache = NoKernelCache()
    cache.put(ROOT, [file_entry(2, b"data"), file_entry(3, None)])
    cache.put_inode(attributes(4))
    assert [ino for ino in range(10) if cache.lacks_xattrs(ino)] == [2, 3, 4]
    cache.put_inode(attributes(3, xattrs=True))
    cache.drop_inode(4)
    assert [ino for ino in range(10) if cache.lacks_xattrs(ino)] == [2]
    for ino in range(5, 9):
        cache.put_inode(attributes(ino))
    assert [ino for ino in range(10) if cache.lacks_xattrs(ino)] == [6, 7, 8]
    cache.bump_epoch()
    assert not any(cache.lacks_xattrs(ino) for ino in range(10))


def test_without_acceleration_nothing_else_is_kept() -> None:
    cache: Cache = NoKernelCache()
    cache.put(ROOT, [file_entry(2, b"data")])
    cache.put_inode(attributes(2))
    cache.renew(1)
    assert not cache.is_open(2)
    assert cache.figures() == {}
    cache.close()


def test_many_entries(make: MakeKernel, capsys: pytest.CaptureFixture[str]) -> None:
    bpf = make(capacity=131072)
    total, taken = 100_000, 0.0
    for start in range(2, total + 2, 1000):
        batch = [file_entry(ino, None) for ino in range(start, start + 1000)]
        before = time.perf_counter()
        bpf.cache.put(ROOT, batch)
        taken += time.perf_counter() - before
    counts = native.count_entries(bpf.fds)
    assert counts == (total, total)
    with capsys.disabled():
        print(f" [{total} entries in {taken:.2f} s, {taken / total * 1e6:.2f} us each] ", end="")


# A writer beside the programs

WRITTEN = range(2, 26)


def written_size(generation: int) -> int:
    """Return a size from one byte to nearly the largest, most of them large: a long copy is easily overtaken."""
    return 1 + generation * 9973 % 65000


def written(generation: int, ino: int) -> tuple[Attributes, bytes]:
    """Return attributes and content that show, in every field, of which generation they are."""
    size = written_size(generation)
    given = attributes(ino, REGULAR, size)
    fields = {name: getattr(given, name) for name in given.__struct_fields__}
    fields |= {"uid": generation, "gid": generation, "nlink": generation, "mtime_ns": generation * 10**9 + generation}
    return Attributes(**fields), content(ino, generation, size)


def keep_writing(fds: MapFds, seed: int, stop: Event) -> None:
    """Rewrite a few inodes, drop them, and now and then everything, until told to stop."""
    cache, chance = KernelCache(fds), random.Random(seed)
    generation = 0
    while not stop.is_set():
        generation += 1
        entries = []
        for ino in chance.sample(WRITTEN, 3):
            given, data = written(generation, ino)
            entries.append(DirectoryEntry(b"file%d" % ino, 1, given, data))
        cache.put(ROOT, entries)
        if generation % 7 == 0:
            cache.drop_inode(chance.choice(WRITTEN))
        if generation % 11 == 0:
            cache.drop_name(ROOT, b"file%d" % chance.choice(WRITTEN))
        if generation % 50 == 0:
            cache.bump_epoch()
    cache.close()


def check_attr(reply: bytes, at: int, ino: int) -> int:
    """Check that a fuse_attr is of this inode and of one generation, and return which."""
    found_ino, size, _, _, mtime, _, _, mtime_ns, _, _, nlink, uid, gid = struct.unpack_from("<6Q7I", reply, at)
    assert found_ino == ino
    assert mtime == mtime_ns == nlink == uid == gid
    assert size == written_size(uid)
    return int(uid)


def check_content(reply: bytes, ino: int) -> int:
    """Check that what was read is whole and of one generation, and return which."""
    found_ino, generation = struct.unpack_from("<QQ", reply.ljust(16, b"\0"))
    if len(reply) >= 16:
        assert found_ino == ino
        assert reply == written(generation, ino)[1]
    return int(generation)


def test_no_answer_mixes_two_values_while_they_are_rewritten(make: MakeKernel) -> None:
    bpf = make(capacity=64, page_count=33)
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    writer = context.Process(target=keep_writing, args=(bpf.fds, 1, stop), daemon=True)
    writer.start()
    seen: set[int] = set()
    outcomes: dict[str, int] = {}
    chance = random.Random(2)
    deadline = time.monotonic() + 20
    try:
        while len(seen) < 2000 and time.monotonic() < deadline:
            ino = chance.choice(WRITTEN)
            for request in (kernel.getattr_(ino), kernel.lookup(ROOT, b"file%d" % ino), kernel.read(ino, 0, 131072)):
                answer = bpf.ask(request)
                outcomes[answer.outcome] = outcomes.get(answer.outcome, 0) + 1
                if outcome(bpf, kernel.open_(ino)) == "ANSWERED":
                    bpf.ask(kernel.release(ino, kernel.FH_KERNEL | ino))
                if answer.outcome != "ANSWERED":
                    continue
                if request.opcode == kernel.OPCODE["READ"]:
                    seen.add(check_content(answer.payload, ino))
                else:
                    seen.add(check_attr(answer.payload, 16 if request.op else 40, ino))
    finally:
        stop.set()
        writer.join(10)
    assert writer.exitcode == 0
    assert not any(bpf.cache.is_open(ino) for ino in WRITTEN)
    assert len(seen) >= 2000, outcomes
