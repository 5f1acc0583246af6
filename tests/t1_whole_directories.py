"""Directories that are marked as whole: which names the BPF programs answer as absent unasked, and which never."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event

import kernel
import pytest
from kernel import Kernel, MakeKernel, attributes

from fuseclient import native
from fuseclient.config import MapFds
from fuseclient.kernel_cache import KernelCache
from metaserver.wire import DirectoryEntry

TOP, OTHER = 2, 3
#: Inodes of files, which are called by them.
FILES = range(100, 140)


@pytest.fixture
def make() -> Iterator[MakeKernel]:
    kernel.require_bpf()
    yield from kernel.making()


@pytest.fixture
def bpf(make: MakeKernel) -> Kernel:
    """With FILES in TOP, which is whole."""
    made = make()
    fill(made.cache, TOP)
    return made


def name_of(ino: int) -> bytes:
    return b"f%d" % ino


def entries(inodes: range) -> list[DirectoryEntry]:
    return [DirectoryEntry(name_of(ino), ino, attributes(ino)) for ino in inodes]


def fill(cache: KernelCache, directory: int, inodes: range = FILES) -> bool:
    losses = cache.losses(directory)
    cache.put(directory, entries(inodes))
    return cache.put_whole(directory, losses)


def ask(bpf: Kernel, name: bytes, directory: int = TOP) -> str:
    return bpf.ask(kernel.lookup(directory, name)).outcome


def test_what_a_whole_directory_lacks_is_absent_unasked(bpf: Kernel) -> None:
    answer = bpf.ask(kernel.lookup(TOP, b"never asked for"))
    assert (answer.outcome, answer.error) == ("ANSWERED_ABSENT", 0)
    assert answer.payload[:8] == bytes(8)
    assert all(ask(bpf, name_of(ino)) == "ANSWERED" for ino in FILES)
    assert ask(bpf, b"never asked for", OTHER) == "MISS_NAME"
    assert bpf.cache.figures()["filling"]["wholes"] == 1


def test_its_answers_last_as_long_as_others(bpf: Kernel) -> None:
    bpf.control.kernel_ttl_max = 1_500_000_000
    bpf.cache.put_absent(OTHER, b"absent")
    unasked = bpf.ask(kernel.lookup(TOP, b"absent")).payload
    assert unasked == bpf.ask(kernel.lookup(OTHER, b"absent")).payload
    bpf.cache.renew(0)
    assert ask(bpf, b"absent") == "MISS_DEADLINE"


def test_an_empty_directory_lacks_every_name(make: MakeKernel) -> None:
    bpf = make()
    assert bpf.cache.put_whole(TOP, bpf.cache.losses(TOP))
    assert ask(bpf, b"name") == "ANSWERED_ABSENT"
    bpf.cache.put_name(TOP, b"name", 100)
    bpf.cache.put_inode(attributes(100))
    assert ask(bpf, b"name") == "ANSWERED"
    assert ask(bpf, b"another") == "ANSWERED_ABSENT"


@pytest.mark.parametrize("name", [b".", b".."])
def test_dots_are_no_names(bpf: Kernel, name: bytes) -> None:
    assert ask(bpf, name) == "MISS_NAME"
    assert ask(bpf, name + b"x") == "ANSWERED_ABSENT"


def test_names_that_are_put_and_removed_leave_it_whole(bpf: Kernel) -> None:
    bpf.cache.put_inode(attributes(200))
    bpf.cache.put_name(TOP, b"new", 200)
    assert ask(bpf, b"new") == "ANSWERED"
    bpf.cache.put_absent(TOP, b"new")
    bpf.cache.put_absent(TOP, name_of(FILES[0]))
    assert [ask(bpf, name) for name in (b"new", name_of(FILES[0]), b"x")] == ["ANSWERED_ABSENT"] * 3


def test_a_dropped_inode_leaves_it_whole_and_is_no_absence(bpf: Kernel) -> None:
    bpf.cache.drop_inode(FILES[0])
    assert ask(bpf, name_of(FILES[0])) == "MISS_INODE"
    assert ask(bpf, b"x") == "ANSWERED_ABSENT"


@pytest.mark.parametrize("name", [name_of(FILES[3]), b"never there"])
def test_a_dropped_name_is_the_end_of_it(bpf: Kernel, name: bytes) -> None:
    fill(bpf.cache, OTHER, range(200, 210))
    bpf.cache.drop_name(TOP, name)
    assert ask(bpf, name) == "MISS_NAME"
    assert ask(bpf, b"x") == "MISS_NAME"
    assert ask(bpf, b"x", OTHER) == "ANSWERED_ABSENT"


def test_it_can_be_forgotten_alone(bpf: Kernel) -> None:
    bpf.cache.drop_whole(TOP)
    bpf.cache.drop_whole(OTHER)
    assert ask(bpf, b"x") == "MISS_NAME"
    assert ask(bpf, name_of(FILES[0])) == "ANSWERED"


def test_a_new_epoch_is_the_end_of_it(bpf: Kernel) -> None:
    losses = bpf.cache.losses(TOP)
    bpf.cache.bump_epoch()
    assert ask(bpf, b"x") == "MISS_EPOCH"
    assert not bpf.cache.put_whole(TOP, losses)
    assert ask(bpf, b"x") == "MISS_EPOCH"
    assert fill(bpf.cache, TOP)
    assert ask(bpf, b"x") == "ANSWERED_ABSENT"


def test_a_name_lost_while_it_was_filled_keeps_it_from_being_whole(make: MakeKernel) -> None:
    bpf = make()
    losses = bpf.cache.losses(TOP)
    bpf.cache.put(TOP, entries(FILES))
    bpf.cache.drop_name(TOP, name_of(FILES[0]))
    assert not bpf.cache.put_whole(TOP, losses)
    assert ask(bpf, b"x") == "MISS_NAME"


def test_the_next_worker_begins_without(bpf: Kernel) -> None:
    """It does not know what the one before it was about to put."""
    following = KernelCache(bpf.fds)
    assert ask(bpf, b"x") == "MISS_NAME"
    assert ask(bpf, name_of(FILES[0])) == "ANSWERED"
    assert fill(following, TOP)
    assert ask(bpf, b"x") == "ANSWERED_ABSENT"
    following.close()


def test_nothing_is_absent_while_names_are_changed(bpf: Kernel) -> None:
    """A worker that dies then leaves it at that, until the next one has put something."""
    bpf.control.names_changes |= 1
    assert ask(bpf, b"x") == "MISS_RACE"
    assert ask(bpf, name_of(FILES[0])) == "ANSWERED"
    following = KernelCache(bpf.fds)
    assert fill(following, TOP)
    assert ask(bpf, b"x") == "ANSWERED_ABSENT"
    following.close()


def test_no_directory_is_whole_of_which_something_was_evicted(make: MakeKernel) -> None:
    """Whatever a full cache gives up: a name that is there is never absent."""
    bpf = make(capacity=256)
    chance = random.Random(5)
    directories = {ino: range(1000 * ino, 1000 * ino + chance.randrange(1, 90)) for ino in range(10, 40)}
    said = 0
    for _ in range(150):
        directory = chance.choice(list(directories))
        said += fill(bpf.cache, directory, directories[directory])
        for other in chance.sample(list(directories), 5):
            for ino in directories[other]:
                assert ask(bpf, name_of(ino), other) in ("ANSWERED", "MISS_NAME", "MISS_INODE")
    assert said > 100
    assert any(ask(bpf, b"x", each) == "ANSWERED_ABSENT" for each in directories)
    assert bpf.cache.figures()["filling"]["evicted_groups"] > 50
    assert native.count_entries(bpf.fds)[0] <= 256


def test_a_directory_of_more_names_than_there_is_room_for_is_never_whole(make: MakeKernel) -> None:
    bpf = make(capacity=64)
    assert not fill(bpf.cache, TOP, range(100, 300))
    assert ask(bpf, b"x") == "MISS_NAME"


def test_many_directories_give_room_back(make: MakeKernel) -> None:
    """That a directory is whole is given up with it: it takes no room for ever."""
    bpf = make(capacity=64)
    for ino in range(1000):
        assert bpf.cache.put_whole(10 + ino, bpf.cache.losses(10 + ino))
    assert 0 < native.count_entries(bpf.fds)[0] <= 64
    assert ask(bpf, b"x", 1009) == "ANSWERED_ABSENT"


def keep_putting(fds: MapFds, stop: Event) -> None:
    """Replace the names of a whole directory, over and over, and now and then have it not be whole for a while."""
    cache, chance = KernelCache(fds), random.Random(1)
    rounds = 0
    while not stop.is_set():
        rounds += 1
        fill(cache, TOP)
        for _ in range(20):
            some = chance.randrange(len(FILES))
            cache.put(TOP, entries(FILES[some : some + chance.randrange(1, 9)]))
            cache.put_absent(TOP, b"absent")
        if rounds % 5 == 0:
            cache.drop_name(TOP, name_of(chance.choice(FILES)))
    cache.close()


def test_a_name_is_not_missed_while_it_is_replaced(make: MakeKernel) -> None:
    """A lookup in a hash map may pass by an element that another CPU replaces; that is no absence."""
    bpf = make(capacity=64)  # few buckets: long chains
    fill(bpf.cache, TOP)
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    writer = context.Process(target=keep_putting, args=(bpf.fds, stop), daemon=True)
    writer.start()
    seen: dict[str, int] = {}
    chance = random.Random(2)
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline and seen.get("ANSWERED_ABSENT", 0) < 100:
            for _ in range(20):
                assert ask(bpf, name_of(chance.choice(FILES))) in ("ANSWERED", "MISS_NAME", "MISS_INODE", "MISS_RACE")
            outcome = ask(bpf, b"x")
            seen[outcome] = seen.get(outcome, 0) + 1
    finally:
        stop.set()
        writer.join(10)
    assert writer.exitcode == 0
    assert seen["ANSWERED_ABSENT"] >= 100, seen
