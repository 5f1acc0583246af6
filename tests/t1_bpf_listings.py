"""READDIR and READDIRPLUS as the BPF programs answer them from listings, without a mount."""

from __future__ import annotations

import itertools
import multiprocessing
import struct
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import bpf_map
import kernel
import pytest
from kernel import DIRECTORY, FH_KERNEL, FIFO, REGULAR, SYMLINK, Kernel, attributes

from fuseclient._native import ffi, lib
from fuseclient.config import MapFds
from fuseclient.kernel_cache import KernelCache
from fuseclient.worker.feeding import Feeder
from fuseclient.worker.listings import Entry, Listings
from metaserver import wire

TOP, OTHER, GONE = 1, 2, 3
PAGES = 256
DIRENT = struct.Struct("<QQII")
ENTRY_BYTES = 128
LONG = b"n" * 255
FILE_KINDS = {REGULAR: 8, DIRECTORY: 4, SYMLINK: 10, FIFO: 1}


class Told(NamedTuple):
    """One entry of a reply. ``nodeid`` and ``size`` are of READDIRPLUS."""

    name: bytes
    ino: int
    offset: int
    kind: int
    nodeid: int | None = None
    size: int | None = None


@pytest.fixture(scope="module")
def shared() -> Iterator[Kernel]:
    kernel.require_bpf()
    made = Kernel(page_count=PAGES)
    yield made
    made.close()


@pytest.fixture
def bpf(shared: Kernel) -> Kernel:
    """The programs with nothing but two empty directories without listings, and an hour of lease."""
    shared.cache.bump_epoch()
    shared.cache.renew(time.clock_gettime_ns(time.CLOCK_BOOTTIME) + kernel.HOUR_NS)
    shared.control.kernel_ttl_max = 1_500_000_000
    for ino in (TOP, OTHER):
        shared.cache.put_inode(attributes(ino, DIRECTORY))
    return shared


def entries_of(*names: bytes, first_ino: int = 100, first_cookie: int = 7) -> list[Entry]:
    """Return entries of all kinds with cookies that are not next to one another."""
    modes = itertools.cycle(FILE_KINDS)
    return [
        Entry(name, first_cookie + 3 * index, attributes(first_ino + index, mode, size=index))
        for index, (name, mode) in enumerate(zip(names, modes))  # noqa: B905
    ]


def fill(bpf: Kernel, entries: list[Entry], ino: int = TOP, *, inodes: bool = True) -> None:
    """Put a directory's listing, and the inodes in it."""
    if inodes:
        for entry in entries:
            bpf.cache.put_inode(entry.attributes)
    Listings(bpf.cache).fetched(ino, 0, entries, complete=True)


def parse(reply: bytes, *, plus: bool) -> list[Told]:
    """Take a reply apart, having checked that it is nothing but whole entries."""
    told, at = [], 0
    while at < len(reply):
        nodeid = size = None
        if plus:
            nodeid, generation, entry_s, attr_s, entry_ns, attr_ns, ino = struct.unpack_from("<QQQQIIQ", reply, at)
            assert generation == 0
            if nodeid:
                assert (entry_s, entry_ns) == (attr_s, attr_ns)
                assert ino == nodeid
                size = struct.unpack_from("<Q", reply, at + 48)[0]
            else:
                assert not any(reply[at : at + ENTRY_BYTES])
            at += ENTRY_BYTES
        ino, offset, length, kind = DIRENT.unpack_from(reply, at)
        name = reply[at + DIRENT.size : at + DIRENT.size + length]
        assert len(name) == length
        at += -(-(DIRENT.size + length) // 8) * 8
        told.append(Told(name, ino, offset, kind, nodeid, size))
    assert at == len(reply)
    return told


def expected(entries: list[Entry], *, plus: bool, ino: int = TOP, known: bool = True) -> list[Told]:
    """Return what is told of a whole directory."""
    dots = [Told(b"." * number, ino, number, 4, 0 if plus else None) for number in (1, 2)]
    return dots + [
        Told(
            entry.name,
            entry.attributes.ino,
            entry.cookie + 2,
            FILE_KINDS[entry.attributes.mode],
            (entry.attributes.ino if known else 0) if plus else None,
            entry.attributes.size if plus and known else None,
        )
        for entry in entries
    ]


def ask(bpf: Kernel, offset: int = 0, size: int = 4096, fh: int = 0, *, plus: bool, ino: int = TOP) -> list[Told]:
    answer = bpf.ask(kernel.readdir(ino, offset, size, fh, plus=plus))
    assert (answer.outcome, answer.error) == ("ANSWERED", 0)
    assert len(answer.payload) <= size
    return parse(answer.payload, plus=plus)


def missed(bpf: Kernel, offset: int = 0, size: int = 4096, fh: int = 0, *, plus: bool, ino: int = TOP) -> str:
    return bpf.ask(kernel.readdir(ino, offset, size, fh, plus=plus)).outcome


def read_all(bpf: Kernel, size: int, *, plus: bool, ino: int = TOP) -> list[Told]:
    """List a directory to its end, as the kernel does."""
    fh = struct.unpack_from("<Q", bpf.ask(kernel.opendir(ino)).payload)[0]
    told: list[Told] = []
    while some := ask(bpf, told[-1].offset if told else 0, size, fh, plus=plus, ino=ino):
        told += some
    return told


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 17])
def test_a_directory_in_one_reply(bpf: Kernel, count: int, plus: bool) -> None:
    entries = entries_of(*(b"name%d" % index for index in range(count)))
    fill(bpf, entries)
    assert ask(bpf, plus=plus) == expected(entries, plus=plus)
    assert ask(bpf, entries[-1].cookie + 2 if entries else 2, plus=plus) == []


@pytest.mark.parametrize("plus", [False, True])
def test_names_of_every_length(bpf: Kernel, plus: bool) -> None:
    entries = entries_of(*(b"%d".ljust(length, b"x") for length in range(2, 256)))
    fill(bpf, entries)
    for size in (4096, 32768, 262144):
        assert read_all(bpf, size, plus=plus) == expected(entries, plus=plus)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("size", [24 + 8 + 128, 300, 411, 412, 1000, 4096, 65536, 262144])
def test_a_directory_in_parts_of_every_size(bpf: Kernel, size: int, plus: bool) -> None:
    entries = entries_of(*(b"n" * (1 + index % 7) + b"%d" % index for index in range(500)))
    if size < 400:
        entries = entries_of(*(b"%d" % index for index in range(500)))
    fill(bpf, entries)
    assert read_all(bpf, size, plus=plus) == expected(entries, plus=plus)


@pytest.mark.parametrize("plus", [False, True])
def test_reading_goes_on_behind_any_offset(bpf: Kernel, plus: bool) -> None:
    entries = entries_of(*(b"name%d" % index for index in range(50)))
    fill(bpf, entries)
    whole = expected(entries, plus=plus)
    for offset in range(entries[-1].cookie + 5):
        assert ask(bpf, offset, 65536, plus=plus) == [each for each in whole if each.offset > offset]
    for offset in (1 << 40, 1 << 62, (1 << 64) - 1):
        assert ask(bpf, offset, 65536, plus=plus) == []


@pytest.mark.parametrize("plus", [False, True])
def test_offsets_of_64_bits(bpf: Kernel, plus: bool) -> None:
    entries = [Entry(b"a", 2**32 - 3, attributes(100)), Entry(b"b", 2**32, attributes(101, DIRECTORY))]
    entries.append(Entry(b"c", 2**62, attributes(102, SYMLINK)))
    fill(bpf, entries)
    whole = expected(entries, plus=plus)
    assert ask(bpf, plus=plus) == whole
    for index, entry in enumerate(entries):
        assert ask(bpf, entry.cookie + 2, plus=plus) == whole[3 + index :]
        assert ask(bpf, entry.cookie + 1, plus=plus) == whole[2 + index :]


def test_a_listing_over_many_pages(bpf: Kernel) -> None:
    entries = entries_of(*(b"name-%06d" % index for index in range(9000)))
    fill(bpf, entries, inodes=False)
    assert read_all(bpf, 32768, plus=False) == expected(entries, plus=False)
    assert read_all(bpf, 262144, plus=True) == expected(entries, plus=True, known=False)


def test_what_is_not_known_of_an_inode_is_not_told(bpf: Kernel) -> None:
    entries = entries_of(b"known", b"dropped", b"written", b"old")
    fill(bpf, entries)
    known, dropped, written, _ = (entry.attributes for entry in entries)
    bpf.cache.drop_inode(dropped.ino)
    bpf.cache.put_inode(attributes(written.ino, mode=0))
    told = ask(bpf, plus=True)
    assert [each.nodeid for each in told] == [0, 0, known.ino, 0, 0, entries[3].attributes.ino]
    assert [each.name for each in told[2:]] == [entry.name for entry in entries]


def test_the_time_to_live_is_what_is_left_of_the_lease(bpf: Kernel) -> None:
    fill(bpf, entries_of(b"file"))
    bpf.control.kernel_ttl_max = 2**64 - 1
    deadline = time.clock_gettime_ns(time.CLOCK_BOOTTIME) + 10 * 10**9
    bpf.cache.renew(deadline)
    reply = bpf.ask(kernel.readdir(TOP, 2, plus=True)).payload
    entry_s, attr_s, entry_ns, attr_ns = struct.unpack_from("<QQII", reply, 16)
    assert (entry_s, entry_ns) == (attr_s, attr_ns)
    left_ns = deadline - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert left_ns <= entry_s * 10**9 + entry_ns <= 10 * 10**9


@pytest.mark.parametrize("plus", [False, True])
def test_misses(bpf: Kernel, plus: bool) -> None:
    entries = entries_of(b"file", LONG)
    bpf.cache.put_inode(attributes(9, REGULAR, 5), b"12345")
    assert missed(bpf, plus=plus) == "MISS_DATA"
    assert missed(bpf, plus=plus, ino=GONE) == "MISS_INODE"
    assert missed(bpf, plus=plus, ino=9) == "MISS_FLAGS"
    fill(bpf, entries)
    assert missed(bpf, plus=plus, ino=OTHER) == "MISS_DATA"
    assert missed(bpf, size=lib.BPFUSE_PAYLOAD + 1, plus=plus) == "MISS_RANGE"
    assert missed(bpf, size=0, plus=plus) == "MISS_RANGE"
    assert missed(bpf, offset=entries[0].cookie + 2, size=200, plus=plus) == "MISS_RANGE"
    assert ask(bpf, size=lib.BPFUSE_PAYLOAD, plus=plus) == expected(entries, plus=plus)
    bpf.cache.bump_epoch()
    assert missed(bpf, plus=plus) == "MISS_EPOCH"


def test_a_listing_is_gone_on_with_by_its_own_handles(bpf: Kernel) -> None:
    entries = entries_of(b"a", b"b", b"c")
    old = struct.unpack_from("<Q", bpf.ask(kernel.opendir(TOP)).payload)[0]
    for _ in range(2):
        fill(bpf, entries)
        assert ask(bpf, 2, fh=old, plus=False) == expected(entries, plus=False)[2:]
        bpf.cache.put_inode(attributes(TOP, DIRECTORY))
    bpf.cache.put_inode(attributes(TOP, DIRECTORY, version=6))
    assert not is_listed(bpf)
    fill(bpf, entries)
    new = struct.unpack_from("<Q", bpf.ask(kernel.opendir(TOP)).payload)[0]
    worker = 6 << 48 | TOP
    for fh in (old, worker, FH_KERNEL | TOP):
        assert missed(bpf, 2, fh=fh, plus=False) == "MISS_HANDLE"
        assert ask(bpf, 0, fh=fh, plus=False) == expected(entries, plus=False)
        assert ask(bpf, entries[-1].cookie + 2, fh=fh, plus=False) == []
    assert ask(bpf, 2, fh=new, plus=False) == expected(entries, plus=False)[2:]
    assert ask(bpf, 2, fh=0, plus=False) == expected(entries, plus=False)[2:]


# What becomes of a listing


def is_listed(bpf: Kernel, ino: int = TOP) -> bool:
    outcome = missed(bpf, plus=False, ino=ino)
    assert outcome in ("ANSWERED", "MISS_DATA", "MISS_INODE")
    return outcome == "ANSWERED"


def test_a_listing_is_dropped_alone(bpf: Kernel) -> None:
    fill(bpf, entries_of(b"file"))
    bpf.cache.drop_listing(TOP)
    assert not is_listed(bpf)
    assert bpf.ask(kernel.getattr_(TOP)).outcome == "ANSWERED"
    bpf.cache.drop_listing(TOP)
    bpf.cache.drop_listing(GONE)
    fill(bpf, entries_of(b"file"))
    assert is_listed(bpf)


def test_a_listing_goes_with_its_directory(bpf: Kernel) -> None:
    fill(bpf, entries_of(b"file"))
    bpf.cache.drop_inode(TOP)
    assert missed(bpf, plus=False) == "MISS_INODE"
    bpf.cache.put_inode(attributes(TOP, DIRECTORY))
    assert not is_listed(bpf)


def test_a_directory_put_anew_keeps_its_listing(bpf: Kernel) -> None:
    entries = entries_of(b"file")
    fill(bpf, entries)
    bpf.cache.put_inode(attributes(TOP, DIRECTORY))
    assert ask(bpf, plus=True) == expected(entries, plus=True)
    bpf.cache.put(OTHER, [wire.DirectoryEntry(b"top", 1, attributes(TOP, DIRECTORY), None)])
    assert ask(bpf, plus=True) == expected(entries, plus=True)
    bpf.cache.put_inode(attributes(TOP, DIRECTORY, version=6))
    assert not is_listed(bpf)
    fill(bpf, entries)
    bpf.cache.bump_epoch()
    bpf.cache.put_inode(attributes(TOP, DIRECTORY))
    assert not is_listed(bpf)


def test_an_unknown_directory_gets_no_listing(bpf: Kernel) -> None:
    fill(bpf, entries_of(b"file"), GONE)
    assert missed(bpf, plus=False, ino=GONE) == "MISS_INODE"
    bpf.cache.put_inode(attributes(GONE))
    fill(bpf, entries_of(b"file"), GONE)
    assert missed(bpf, plus=False, ino=GONE) == "MISS_FLAGS"


def test_newer_content_overtakes_a_listing(bpf: Kernel) -> None:
    fill(bpf, entries_of(b"file"))
    for ino in range(1000, 1000 + PAGES):
        bpf.cache.put_inode(attributes(ino, size=4096), bytes(4096))
    assert not is_listed(bpf)
    assert bpf.ask(kernel.getattr_(TOP)).outcome == "ANSWERED"
    assert bpf.cache.figures()["filling"]["overtaken"] > 0


def test_a_listing_overtakes_content_and_itself(bpf: Kernel) -> None:
    entries = entries_of(*(b"name-%06d" % index for index in range(9000)))
    files = range(1000, 1100)
    for ino in files:
        bpf.cache.put_inode(attributes(ino, size=4), b"data")
    for ino in (TOP, OTHER, TOP, OTHER, TOP):
        fill(bpf, entries, ino, inodes=False)
        assert read_all(bpf, 262144, plus=False, ino=ino) == expected(entries, plus=False, ino=ino)
    outcomes = [bpf.ask(kernel.read(ino, 0, 10)).outcome for ino in files]
    assert outcomes.count("MISS_DATA") > len(files) // 2
    assert set(outcomes) <= {"MISS_DATA", "ANSWERED"}


def test_a_listing_of_too_many_bytes_is_not_kept(bpf: Kernel) -> None:
    limit = bpf.cache.listing_limit
    assert limit == PAGES * lib.BPFUSE_PAGE // 2
    dirent = DIRENT.pack(5, 1, 4, 8) + b"name".ljust(8, b"\0")
    fits = (limit - 8) // (len(dirent) + 4)
    assert bpf.cache.put_listing(TOP, dirent * fits)
    assert not bpf.cache.put_listing(OTHER, dirent * (fits + 1))
    assert is_listed(bpf)
    assert not is_listed(bpf, OTHER)


@pytest.mark.parametrize("cut", [1, 8, 9, 31])
def test_entries_that_are_not_whole_are_refused(bpf: Kernel, cut: int) -> None:
    dirents = DIRENT.pack(5, 1, 4, 8) + b"name".ljust(8, b"\0")
    assert not bpf.cache.put_listing(TOP, (dirents * 2)[:-cut])
    assert not bpf.cache.put_listing(TOP, b"")
    assert not bpf.cache.put_listing(TOP, DIRENT.pack(5, 1, 256, 8) + bytes(256))
    assert not is_listed(bpf)


def test_the_next_worker_drops_the_listings_of_this_one(bpf: Kernel) -> None:
    fill(bpf, entries_of(b"file"))
    second = KernelCache(bpf.fds)
    second.put_inode(attributes(TOP, DIRECTORY))
    assert is_listed(bpf)
    second.drop_listing(TOP)
    assert not is_listed(bpf)
    second.close()


def damage(bpf: Kernel, word: int, value: int) -> None:
    """Overwrite a word of TOP's listing, as content that overtakes it does."""
    inode = ffi.new("struct bpfuse_inode_value *")
    bpf_map.lookup(bpf.fds.inodes, TOP, inode)
    struct.pack_into("<I", bpf.cache._pages, inode.first_page * lib.BPFUSE_PAGE + 4 * word, value)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("value", [0, 1, 4, 8, 2000, 2**31, 2**32 - 8, 2**32 - 1])
def test_a_listing_that_is_overwritten_is_never_read_outside(bpf: Kernel, value: int, plus: bool) -> None:
    """Whatever stands there: an answer or a miss, and nothing else. `Kernel.ask` checks sizes."""
    entries = entries_of(*(b"name%d" % index for index in range(40)))
    for word in (*range(8), 20, 41, 42, 43, 44, 45, 46, 47):
        fill(bpf, entries)
        damage(bpf, word, value)
        for offset in (0, 1, 30, 100):
            answer = bpf.ask(kernel.readdir(TOP, offset, 1000, plus=plus))
            assert answer.outcome in ("ANSWERED", "MISS_DATA", "MISS_RANGE")
            assert len(answer.payload) <= 1000


@pytest.mark.parametrize(
    "fields",
    [{"first_page": PAGES}, {"first_page": 2**32 - 1}, {"data_bytes": 2**32 - 1}, {"data_bytes": 0}, {"data_bytes": 3}],
)
def test_an_extent_outside_the_pages_is_missed(bpf: Kernel, fields: dict[str, int]) -> None:
    fill(bpf, entries_of(b"file"))
    value = ffi.new("struct bpfuse_inode_value *")
    bpf_map.lookup(bpf.fds.inodes, TOP, value)
    for name, number in fields.items():
        setattr(value, name, number)
    bpf_map.update(bpf.fds.inodes, TOP, value)
    for plus in (False, True):
        assert missed(bpf, plus=plus) == "MISS_DATA"


def keep_listing(fds: MapFds, stop: Any) -> None:
    """Put listings of a directory, each of one generation, until told to stop; now and then drop something."""
    cache = KernelCache(fds)
    for generation in itertools.count(1):
        if stop.is_set():
            break
        entries = entries_of(*(b"%d-%d" % (generation, index) for index in range(generation % 300)))
        for entry in entries[:20]:
            cache.put_inode(entry.attributes)
        Listings(cache).fetched(TOP, 0, entries, complete=True)
        if generation % 3 == 0:
            cache.drop_inode(100)
        if generation % 5 == 0:
            cache.drop_listing(TOP)
        if generation % 50 == 0:
            cache.bump_epoch()
            cache.put_inode(attributes(TOP, DIRECTORY))
    cache.close()


def test_no_answer_mixes_two_listings_while_they_are_rewritten(bpf: Kernel) -> None:
    """The ring is small enough that pages are overwritten while they are read."""
    small = Kernel(page_count=24)
    small.cache.put_inode(attributes(TOP, DIRECTORY))
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    writer = context.Process(target=keep_listing, args=(small.fds, stop), daemon=True)
    writer.start()
    seen: set[int] = set()
    deadline = time.monotonic() + 20
    try:
        while len(seen) < 300 and time.monotonic() < deadline:
            for plus in (False, True):
                answer = small.ask(kernel.readdir(TOP, 0, 65536, plus=plus))
                if answer.outcome == "ANSWERED":
                    names = [told.name for told in parse(answer.payload, plus=plus)[2:]]
                    generations = {int(name.split(b"-")[0]) for name in names}
                    assert len(generations) <= 1
                    assert names == [name for index, name in enumerate(names) if name.endswith(b"-%d" % index)]
                    seen |= generations
    finally:
        stop.set()
        writer.join(10)
        small.close()
    assert writer.exitcode == 0
    assert len(seen) >= 300


# Putting listings together


def test_fetches_that_follow_one_another_make_a_listing(bpf: Kernel) -> None:
    entries = entries_of(*(b"name%d" % index for index in range(30)))
    listings = Listings(bpf.cache)
    listings.fetched(TOP, 0, entries[:10], complete=False)
    assert not is_listed(bpf)
    listings.fetched(TOP, entries[4].cookie, entries[5:20], complete=False)
    listings.fetched(TOP, entries[19].cookie, entries[20:], complete=True)
    assert ask(bpf, plus=False) == expected(entries, plus=False)


def test_fetches_with_a_gap_make_none(bpf: Kernel) -> None:
    entries = entries_of(*(b"name%d" % index for index in range(30)))
    listings = Listings(bpf.cache)
    listings.fetched(TOP, entries[4].cookie, entries[5:], complete=True)
    listings.fetched(TOP, 0, entries[:4], complete=False)
    listings.fetched(TOP, entries[4].cookie, entries[5:], complete=True)
    assert not is_listed(bpf)


def test_a_name_between_two_fetches_ends_a_listing(bpf: Kernel) -> None:
    entries = entries_of(*(b"name%d" % index for index in range(30)))
    feeder = Feeder(bpf.cache, lambda ino: False)
    with feeder.begin() as token:
        feeder.listing(token, TOP, 0, entries[:10], complete=False)
    feeder.drop_name(TOP, b"new")
    with feeder.begin() as token:
        feeder.listing(token, TOP, entries[9].cookie, entries[10:], complete=True)
    assert not is_listed(bpf)


@pytest.mark.parametrize("when", ["before the fetch", "in the fetch", "after it"])
def test_a_name_makes_a_listing_out_of_date(bpf: Kernel, when: str) -> None:
    entries = entries_of(*(b"name%d" % index for index in range(3)))
    feeder = Feeder(bpf.cache, lambda ino: False)
    if when == "before the fetch":
        feeder.drop_name(TOP, b"new")
    with feeder.begin() as token:
        if when == "in the fetch":
            feeder.drop_name(TOP, b"new")
        feeder.drop_name(OTHER, b"new")
        feeder.listing(token, TOP, 0, entries, complete=True)
    if when == "after it":
        feeder.drop_name(TOP, b"new")
    assert is_listed(bpf) == (when == "before the fetch")


def test_few_directories_are_put_together_at_once(bpf: Kernel) -> None:
    listings = Listings(bpf.cache)
    for ino in range(2000, 2020):
        listings.fetched(ino, 0, entries_of(b"a"), complete=False)
    assert len(listings._parts) == 16
    listings.clear()
    assert not listings._parts
