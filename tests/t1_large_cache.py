"""A million entries in the kernel cache: cached through all that the worker remembers of them, looked up, given up."""

from __future__ import annotations

import gc
import random
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import kernel
import pytest
from kernel import Kernel

from fuseclient import native
from fuseclient.worker.directories import Directories
from fuseclient.worker.feeding import Feeder
from fuseclient.worker.places import Places
from fuseclient.worker.siblings import Siblings
from metaserver import wire

FILES: Final = 1000
DIRECTORIES: Final = 1000
#: What does not fit in beside a million.
MORE: Final = 300
CAPACITY: Final = 1_010_000
PAGE: Final = 250
MEGABYTE: Final = 1_000_000


class Session:
    """A metaserver of directories of many small files, which it makes up as they are asked for."""

    async def stream(self, request: wire.FetchDirectory) -> AsyncIterator[wire.DirectoryPage]:
        own = _attributes(request.ino, stat.S_IFDIR | 0o755)
        for begin in range(0, FILES, PAGE):
            entries = [
                wire.DirectoryEntry(b"%d" % n, n + 1, _attributes(_file(request.ino, n), stat.S_IFREG | 0o644))
                for n in range(begin, begin + PAGE)
            ]
            last = begin + PAGE == FILES
            yield wire.DirectoryPage(own, entries, last, last, True)

    async def call(self, request: Any, reply_type: Any) -> Any:
        raise AssertionError(f"{request} is not asked for where everything is fetched")


def _file(directory: int, number: int) -> int:
    return directory * FILES + 2_000_000 + number


def _attributes(ino: int, mode: int) -> wire.Attributes:
    return wire.Attributes(ino, mode, 1, 0, 0, 0, 100, 1, 1, 1, wire.InodeFlag.INLINE, 1)


@pytest.fixture
def bpf() -> Iterator[Kernel]:
    kernel.require_bpf()
    made = Kernel(capacity=CAPACITY)
    yield made
    made.close()


def _resident_bytes() -> int:
    gc.collect()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def _answered(bpf: Kernel, directories: range) -> set[bool]:
    """Return whether lookups of some files, of each of some directories, are answered as they should be."""
    found = set()
    for parent in directories:
        number = random.Random(parent).randrange(FILES)
        answer = bpf.ask(kernel.lookup(parent, b"%d" % number))
        ino = int.from_bytes(answer.payload[:8], "little") if answer.outcome == "ANSWERED" else 0
        assert ino in (0, _file(parent, number))
        found.add(ino > 0)
    return found


async def test_a_million_entries(bpf: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    session: Any = Session()
    feeder = Feeder(bpf.cache, lambda ino: False)
    places = Places()
    siblings = Siblings(bpf.cache.is_used, CAPACITY // 2, 0)
    feeder.on_pages += [places.page, siblings.page]
    directories = Directories(session, feeder, window=4096, data_budget=0, siblings=siblings, places=places)
    before = _resident_bytes()
    for parent in range(2, 2 + DIRECTORIES):
        assert (await directories.lookup(parent, b"0")).attributes is not None
    taken = _resident_bytes() - before
    counts = native.count_entries(bpf.fds)
    assert counts.names == (FILES + 1) * DIRECTORIES  # with the marks that they are whole
    assert counts.inodes == (FILES + 1) * DIRECTORIES
    assert _answered(bpf, range(2, 2 + DIRECTORIES)) == {True}
    assert taken <= 200 * MEGABYTE
    kernel_bytes = sum(native.map_bytes(fd) for fd in (bpf.fds.names, bpf.fds.inodes, bpf.fds.uses))
    assert kernel_bytes / CAPACITY <= 300

    for parent in range(2 + DIRECTORIES, 2 + DIRECTORIES + MORE):
        await directories.lookup(parent, b"0")
    assert _answered(bpf, range(2 + DIRECTORIES, 2 + DIRECTORIES + MORE)) == {True}
    filling = bpf.cache.figures()["filling"]
    assert filling["put_failures"] == filling["forced_epochs"] == 0
    assert filling["evicted_groups"] >= MORE - 10
    assert len(bpf.cache.take_evicted().directories) >= MORE - 10
    assert 0 < native.count_entries(bpf.fds).names <= CAPACITY
    with capsys.disabled():
        shown = f"{taken / MEGABYTE:.0f} MB in the worker, {kernel_bytes / CAPACITY:.0f} bytes an entry in the kernel"
        print(f" [{shown}] ", end="")
